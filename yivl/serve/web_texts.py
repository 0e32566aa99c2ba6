"""The texts of the page, in English and in Chinese."""

from typing import Final, Literal, get_args

Language = Literal["English", "中文"]

_TEXTS: Final = {
    "about": ("Ask about an image in English or Chinese.", "用中文或英文提问一张图片。"),
    "image": ("Image", "图片"),
    "conversation": ("Conversation", "对话"),
    "empty": (
        "Add an image and ask a question. A new image starts a new conversation.",
        "放一张图片，然后提问。换一张图片会开始新的对话。",
    ),
    "question": ("Question", "问题"),
    "question_hint": ("What is in the image?", "图片里有什么？"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "regenerate": ("Regenerate", "重新回答"),
    "undo": ("Undo", "撤销"),
    "clear": ("Clear", "清空"),
    "parameters": ("Parameters", "参数"),
    "temperature": ("Temperature", "温度"),
    "temperature_hint": ("0: always the most likely answer", "0 表示最可能的回答"),
    "top_p": ("Top-p", "Top-p"),
    "max_tokens": ("Maximum tokens", "最大词元数"),
    "seed": ("Seed", "随机种子"),
    "seed_hint": ("-1: a different answer each time", "-1 表示每次回答不同"),
    "examples": ("Examples", "示例"),
    "save_json": ("Save as JSON", "保存为 JSON"),
    "save_md": ("Save as Markdown", "保存为 Markdown"),
    "no_question": ("Type a question first.", "请先输入问题。"),
    "no_turns": ("There is no question yet.", "还没有问题。"),
    "gone": (
        "This conversation was closed to make room for others; please start a new one.",
        "为了给别人腾出位置，这个对话已经关闭；请重新开始。",
    ),
    "busy": ("The server is busy; try again in a moment.", "服务器繁忙；请稍后再试。"),
    "no_memory": (
        "There is not enough memory for this; ask with fewer or shorter turns.",
        "内存不足；请减少对话轮数或缩短问题。",
    ),
    "failed": ("The answer failed; the server's log says why.", "回答失败；原因见服务器日志。"),
    "first_token": ("first token", "首个词元"),
    "tokens_per_second": ("tokens/s", "词元/秒"),
    "stopped": ("stopped", "已停止"),
}
TEXTS: Final[dict[Language, dict[str, str]]] = {
    language: {key: texts[index] for key, texts in _TEXTS.items()} for index, language in enumerate(get_args(Language))
}
