"""The conversations of the page's visitors, bounded in number and in memory."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from yivl.checkpoint.loading import LoadedModel
from yivl.inference.chat import Chat, ImageInput
from yivl.serve.limits import Limits


@dataclass
class Session:
    """The conversation of one visitor."""

    chat: Chat
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the chat is in use, also by the scheduler on behalf of a callback."""
    stop_event: threading.Event = field(default_factory=threading.Event)
    """Ends the answer that is generated or queued."""
    image: ImageInput | None = None
    """Of the next question."""

    def restart_stop_event(self) -> threading.Event:
        """End the current answer and return the event of the next one."""
        self.stop_event.set()
        self.stop_event = threading.Event()
        return self.stop_event

    def restart(self, image: ImageInput | None) -> None:
        """Start a new conversation, whose first question is about ``image``."""
        self.stop_event.set()
        with self.lock:
            self.chat.reset()
            self.image = image


class Sessions:
    """Sessions by the key of their visitor; the least recently used are dropped first.

    Args:
        loaded: The model, shared by all.
        limits: The number of sessions and the bytes of their KV caches.
    """

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

    def trim(self) -> None:
        """Free KV caches until the rest fits; the conversations stay, and their next turn re-computes the cache."""
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
            session.stop_event.set()
