"""OpenAI-compatible API: chat completions with images.

YIVL_API_KEY=secret python -m yivl.serve.api
"""

import logging
import os

from yivl import command_line
from yivl.serve.limits import Limits

logger = logging.getLogger(__name__)


def main() -> None:
    """Load a model and serve it."""
    parser = command_line.make_parser(__doc__, prog="python -m yivl.serve.api")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--allow-remote-images", nargs="+", default=(), metavar="HOST", help="hosts that images may be fetched from"
    )
    Limits.add_flags(parser, "api")
    arguments = parser.parse_args()
    limits, api_key = Limits.from_flags(arguments), os.environ.get("YIVL_API_KEY")

    from yivl.serve.listening import Server, bind

    listeners = bind(arguments.host, arguments.port, "--host, --port")

    from yivl.serve.app import build_app
    from yivl.serve.memory import return_large_blocks
    from yivl.serve.scheduler import Scheduler

    return_large_blocks()
    loaded = command_line.load(arguments)
    if api_key is None and arguments.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("%s:%d is open to everyone who can reach it; set YIVL_API_KEY", arguments.host, arguments.port)
    scheduler = Scheduler(loaded, limits)
    app = build_app(scheduler, limits, api_key=api_key, remote_hosts=tuple(arguments.allow_remote_images))
    port = listeners[0].getsockname()[1]
    logger.info("http://%s:%d/v1 answers as %s", arguments.host, port, loaded.name)
    Server(app, scheduler, limits).run(sockets=listeners)


def console() -> None:
    """Run as the console command."""
    command_line.run(main)


if __name__ == "__main__":
    console()
