"""The command line: uvicorn on uvloop, one worker, and one line on standard output when requests are taken."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import uvicorn

from .app import create_app
from .inbox import Inbox
from .ring import Geometry


class AnnouncingServer(uvicorn.Server):
    """Says where it listens once it does, so that whoever started it need not guess or sleep."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets=sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"ready http://{host}:{port}", flush=True)


def serve(inbox_type: type[Inbox] = Inbox, argv: list[str] | None = None) -> None:
    """Parse the command line and serve until a signal ends it."""
    parser = argparse.ArgumentParser(prog="python -m examples.webhook_inbox", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0: any free one, the ready line says which")
    parser.add_argument("--data", type=Path, required=True, help="the ring file, made where it is missing")
    parser.add_argument("--slots", type=int, default=Geometry().slot_count, help="events that fit the ring")
    parser.add_argument("--slot-bytes", type=int, default=Geometry().slot_bytes, help="bytes of the largest record")
    parser.add_argument("--log-level", default="warning")
    options = parser.parse_args(argv)
    geometry = Geometry(slot_count=options.slots, slot_bytes=options.slot_bytes)
    config = uvicorn.Config(
        create_app(options.data, geometry, inbox_type),
        host=options.host,
        port=options.port,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        workers=1,  # never more: every worker would have its own idea of the next free slot of the same file
        access_log=False,
        log_level=options.log_level,
    )
    server = AnnouncingServer(config)
    server.run()
    if not server.started:
        raise SystemExit(3)


if __name__ == "__main__":
    serve()
