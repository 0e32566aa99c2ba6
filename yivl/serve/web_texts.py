"""What the page says, in English and in Chinese."""

from dataclasses import dataclass
from typing import Final, Literal

Language = Literal["English", "中文"]


@dataclass(frozen=True)
class Texts:
    """All words of the page in one language."""

    about: str
    picture: str
    conversation: str
    empty: str
    question: str
    question_hint: str
    send: str
    stop: str
    again: str
    undo: str
    clear: str
    parameters: str
    temperature: str
    temperature_hint: str
    top_p: str
    max_tokens: str
    seed: str
    seed_hint: str
    examples: str
    save_json: str
    save_markdown: str
    no_question: str
    nothing_to_repeat: str
    gone: str
    no_memory: str
    failed: str
    first_token: str
    tokens_per_second: str
    stopped: str


TEXTS: Final[dict[Language, Texts]] = {
    "English": Texts(
        about="Ask about a picture in English or Chinese.",
        picture="ImageInput",
        conversation="Conversation",
        empty="Show a picture, ask a question. A new picture starts a new conversation.",
        question="Question",
        question_hint="What is in the image?",
        send="Send",
        stop="Stop",
        again="Regenerate",
        undo="Undo",
        clear="Clear",
        parameters="Parameters",
        temperature="Temperature",
        temperature_hint="0 gives the likeliest answer",
        top_p="Top-p",
        max_tokens="Tokens at most",
        seed="Seed",
        seed_hint="empty: another answer each time",
        examples="Examples",
        save_json="Save as JSON",
        save_markdown="Save as Markdown",
        no_question="Type a question first.",
        nothing_to_repeat="There is no question yet.",
        gone="This conversation was closed to make room for others; please start anew.",
        no_memory="There is not enough memory for this; ask with fewer or shorter turns.",
        failed="The answer failed; the server's log says why.",
        first_token="first token",
        tokens_per_second="tokens/s",
        stopped="stopped",
    ),
    "中文": Texts(
        about="用中文或英文提问一张图片。",
        picture="图片",
        conversation="对话",
        empty="放一张图片，然后提问。换一张图片会开始新的对话。",
        question="问题",
        question_hint="图片里有什么？",
        send="发送",
        stop="停止",
        again="重新回答",
        undo="撤销",
        clear="清空",
        parameters="参数",
        temperature="温度",
        temperature_hint="0 表示最可能的回答",
        top_p="Top-p",
        max_tokens="最多词元数",
        seed="随机种子",
        seed_hint="留空：每次回答不同",
        examples="示例",
        save_json="保存为 JSON",
        save_markdown="保存为 Markdown",
        no_question="请先输入问题。",
        nothing_to_repeat="还没有问题。",
        gone="为了给别人腾出位置，这个对话已经关闭；请重新开始。",
        no_memory="内存不足；请减少对话轮数或缩短问题。",
        failed="回答失败；原因见服务器日志。",
        first_token="首个词元",
        tokens_per_second="词元/秒",
        stopped="已停止",
    ),
}
