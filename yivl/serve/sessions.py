"""The conversations of the page's visitors, bounded in number."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from yivl.checkpoint.loading import LoadedModel
from yivl.inference.chat import Chat
from yivl.serve.images import SentImage
from yivl.serve.limits import Limits


@dataclass
class Session:
    """The conversation of one visitor."""

    chat: Chat
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the chat is in use, also by the scheduler on behalf of a callback."""
    stop_event: threading.Event = field(default_factory=threading.Event)
    """Ends the answer that is generated or queued."""
    image: SentImage | None = None
    """Of the first question."""
    upload: str | None = None
    """The file of the image."""
    upload_lock: threading.Lock = field(default_factory=threading.Lock)

    def restart(self) -> None:
        """Start a new conversation about the same image."""
        self.stop_event.set()
        with self.lock:
            self.chat.reset()

    def show(self, upload: str | None, read: Callable[[str], SentImage]) -> bool:
        """Start a new conversation about an uploaded file or without one; return whether it is another than before.

        If ``read``, which returns the image of a file, raises, the conversation has no image.
        """
        with self.upload_lock:  # the browser sends an upload and the question after it at the same time
            if upload == self.upload:
                return False
            self.restart()
            self.image = self.upload = None
            if upload is not None:
                self.image, self.upload = read(upload), upload
            return True


class Sessions:
    """Sessions by the key of their visitor; the least recently used are dropped first."""

    def __init__(self, loaded: LoadedModel, limits: Limits) -> None:
        self._loaded = loaded
        self._limits = limits
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str) -> Session:
        """Return the visitor's session, an empty one if there is none."""
        with self._lock:
            session = self._sessions.pop(key, None) or Session(Chat(self._loaded))
            self._sessions[key] = session
            while len(self._sessions) > self._limits.max_sessions:
                _, oldest = self._sessions.popitem(last=False)
                oldest.stop_event.set()
            return session

    def drop(self, key: str) -> None:
        """Forget a visitor."""
        with self._lock:
            if session := self._sessions.pop(key, None):
                session.stop_event.set()
