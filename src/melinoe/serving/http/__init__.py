"""OpenAI's interface: what comes in, what goes out, who waits, who is refused."""
