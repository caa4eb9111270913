"""A local server: the protocols that programs speak already, each a translation into the engine's one request.

    HTTP ─ safety ─ dialect ─ turns, pictures ─ asking ─ engine
                       └────────── events ◄───────┘

Starlette, pydantic and uvicorn: FastAPI would add a quarter of a second to the start, and nothing that is used here.
"""
