"""/v1/messages: Anthropic's form of a chat, in content blocks, with its own events and its own body of errors."""
