"""Chat about images on a web page.

python web_demo.py --server-port 8111
"""

import argparse
import logging
from pathlib import Path

from yivl import command_line
from yivl.serve.limits import Limits

IMAGES = Path(__file__).parent / "images"
EXAMPLES = (
    (IMAGES / "cats.jpg", "Describe the cats and what they are doing in detail."),
    (IMAGES / "cats.jpg", "图片里有什么？"),
    (IMAGES / "exit.jpg", "What does the sign say?"),
    (IMAGES / "bus.jpg", "牌子上写着什么？"),
    (IMAGES / "owls.jpg", "What are they doing?"),
    (IMAGES / "owls.jpg", "地板是什么颜色的？"),
)


def parse_args() -> argparse.Namespace:
    """Return the flags; those of the reference keep their names, docs/fidelity.md lists the defaults that differ."""
    parser = command_line.make_parser(__doc__)
    group = parser.add_argument_group("page")
    group.add_argument("--server-name", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--server-port", type=int, default=8111, help="(default: %(default)s)")
    group.add_argument("--share", action="store_true", help="create a public link through gradio's server")
    group.add_argument("--inbrowser", action="store_true", help="open the page in a browser")
    group.add_argument("--cpu-only", action="store_true", help="the same as --device cpu")
    Limits.add_flags(parser, "web")
    arguments = parser.parse_args()
    if arguments.cpu_only:
        arguments.device = "cpu"
    return arguments


def main() -> None:
    """Load the model, then serve the page until Ctrl-C."""
    arguments = parse_args()
    limits = Limits.from_flags(arguments)

    from yivl.serve.listening import bind

    listeners = bind(arguments.server_name, arguments.server_port, "--server-name, --server-port")
    port = listeners[0].getsockname()[1]  # 0 chooses a free one
    for listener in listeners:
        listener.close()  # gradio opens its own

    from yivl.serve.memory import return_large_blocks
    from yivl.serve.scheduler import Scheduler
    from yivl.serve.web_layout import build_page, launch

    return_large_blocks()
    loaded = command_line.load(arguments)
    blocks = build_page(Scheduler(loaded, limits), limits, EXAMPLES)
    launch(
        blocks,
        limits,
        server_name=arguments.server_name,
        server_port=port,
        share=arguments.share,
        inbrowser=arguments.inbrowser,
    )
    logging.getLogger(__name__).info("http://%s:%d", arguments.server_name, port)
    blocks.block_thread()


if __name__ == "__main__":
    command_line.run(main)
