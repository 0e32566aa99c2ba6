"""Clients of the model for users: the API, the web page and the chat in a terminal."""
