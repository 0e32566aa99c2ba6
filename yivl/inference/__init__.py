"""Questions and images to answers: the engine, its cache, and the conversation on top of it."""
