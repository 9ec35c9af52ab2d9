"""A TCP service: send one line with a prompt, receive the generated text as a stream.

Run `python examples/async_service.py 8700`, then `nc localhost 8700` in any number of terminals. Each connection is a
streaming job. If the caller disconnects, the job is cancelled and its slot becomes free.
"""

import asyncio
import contextlib
import sys

from headrace import client


async def serve(service: client.AsyncClient, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    prompt = (await reader.readline()).decode(errors="replace").strip()
    try:
        job = await service.submit(prompt, max_tokens=200, temperature=0, priority="interactive", stream=True)
        try:
            async for event in job.stream(timeout=60):
                writer.write(event.text.encode())
                await writer.drain()
        except ConnectionError:
            await job.cancel()
    except client.HeadraceError as error:
        writer.write(f"{error}\n".encode())
    finally:
        writer.close()


async def main(port: int) -> None:
    async with client.AsyncClient() as service:
        server = await asyncio.start_server(lambda reader, writer: serve(service, reader, writer), "127.0.0.1", port)
        print("listening on port", server.sockets[0].getsockname()[1], flush=True)
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(int(sys.argv[1])))
