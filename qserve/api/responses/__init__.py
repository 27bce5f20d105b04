"""/v1/responses: OpenAI's newer form of a chat, in items. Nothing is stored between requests."""
