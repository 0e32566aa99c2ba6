"""Where people meet the model."""
