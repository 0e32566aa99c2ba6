"""The conversations of a page's visitors: one each, as many as there is room for."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from yivl.checkpoint.loading import LoadedModel
from yivl.inference.chat import Chat, ImageInput
from yivl.serve.limits import Limits


@dataclass
class Session:
    """One visitor."""

    chat: Chat
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever uses the chat."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Ends the answer that is being generated or waits."""
    picture: ImageInput | None = None
    """For the next question."""

    def begin(self) -> threading.Event:
        """Return a fresh event that ends the next answer, after ending the one before."""
        self.stop.set()
        self.stop = threading.Event()
        return self.stop

    def start_anew(self, picture: ImageInput | None) -> None:
        """Forget the conversation; the next one is about ``picture``."""
        self.stop.set()
        with self.lock:
            self.chat.reset()
            self.picture = picture


class Sessions:
    """Conversations by the key of their visitor; those that were not used for longest go first.

    Args:
        loaded: The model of all of them.
        limits: Of their number, and of the memory of their caches.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits) -> None:
        self._loaded = loaded
        self._limits = limits
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str) -> Session:
        """Return the visitor's conversation, an empty one if there is none (any more)."""
        with self._lock:
            session = self._sessions.pop(key, None) or Session(Chat(self._loaded))
            self._sessions[key] = session
            while len(self._sessions) > self._limits.max_sessions:
                _, oldest = self._sessions.popitem(last=False)
                oldest.stop.set()
            return session

    def trim(self) -> None:
        """Free caches until what is left fits; conversations stay, and compute anew what they need."""
        with self._lock:
            sessions = list(self._sessions.values())
        total = sum(session.chat.num_cache_bytes for session in sessions)
        for session in sessions:
            if total <= self._limits.max_cache_bytes:
                return
            if session.lock.acquire(blocking=False):  # one that is answering needs its cache
                total -= session.chat.num_cache_bytes
                session.chat.free_cache()
                session.lock.release()

    def drop(self, key: str) -> None:
        """Forget a visitor."""
        with self._lock:
            session = self._sessions.pop(key, None)
        if session is not None:
            session.stop.set()
