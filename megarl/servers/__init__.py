"""Models that others serve, asked over the OpenAI-compatible protocol: the only door to `openai`."""
