"""The prompt of ``yivl.conversation`` as a Jinja template, for programs that keep theirs beside the tokenizer."""

from yivl.constants import ASSISTANT, HUMAN, STOP_STRING, SYSTEM_PROMPT


def chat_template(image_token: str = "") -> str:
    """Return the template of a chat; that of the published tokenizer is Yi-Chat's, which Yi-VL was not trained on.

    Messages are as transformers has them: a role, and a text or a list of parts. A message of the role ``system`` at
    the beginning takes the place of the standard one.

    Args:
        image_token: Written, with a line break, in front of a question for each of its pictures; nothing where the
            program puts a marker of its own into the text, as llama.cpp does.
    """
    pictures = (
        "{% if content is not string %}{% for part in content %}{% if part['type'] == 'image' %}"
        f"{image_token}{{{{ '\\n' }}}}"
        "{% endif %}{% endfor %}{% endif %}"
    )
    return (
        "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
        "{% for part in content %}{% if part['type'] != 'image' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{% endmacro %}"
        f"{{% macro pictures(content) %}}{pictures if image_token else ''}{{% endmacro %}}"
        "{% if messages and messages[0]['role'] == 'system' %}{{ text(messages[0]['content']) }}"
        f"{{% else %}}{SYSTEM_PROMPT}{{% endif %}}"
        f"{{{{ '\\n\\n{STOP_STRING} ' }}}}"
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        f"{{{{ '{HUMAN}: ' if message['role'] == 'user' else '{ASSISTANT}: ' }}}}"
        "{{ pictures(message['content']) }}{{ text(message['content']) }}"
        f"{{{{ '\\n{STOP_STRING} ' }}}}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{ASSISTANT}:{{% endif %}}"
    )
