"""`melinoe serve`: an offloaded model behind OpenAI's HTTP interface.

    replicas several processes on Ray Serve
    server   one process: port, model, clients, SIGTERM
    http     what comes in and goes out, who waits, who is refused; asyncio
    page     the chat at /, and what happens to experts for those who look on
    engine   batched or one at a time, in a thread of its own; sampling, text, stops of one request

A request goes http.app -> http.service -> http.answer -> engine, and its tokens come back the same way.
"""
