"""What a streamed token costs the API process: python benchmarks/serving/api_process.py MODEL.

Starts `hasten serve` on an engine process that makes up tokens at a given pace, reads --streams streams
over raw sockets in a third process, and prints the CPU time that the API process took for each token, by
its own account. Every token must arrive once: the run fails if the events of a stream do not add up.

With --pace 0 the engine sends as fast as the socket takes it; pieces are then merged, and the tokens of
an event say how much.
"""

import argparse
import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

MODEL_LEN = 8192
VOCABULARY = 4096


def run_engine(fd: int, tokens_per_s: float) -> None:
    """Stands in for hasten.serve.engine_process: every running request gets a token a step."""
    from hasten.request import TokenEvent
    from hasten.runtimes.base import EngineFacts, EngineStats
    from hasten.runtimes.protocol import Load, MessageSplitter, decoder, frame
    from hasten.serve.messages import Abort, Ready, Step, Submit, ToEngine

    channel = socket.socket(fileno=fd)
    splitter = MessageSplitter(decoder(ToEngine))
    facts = EngineFacts("null", "null", "none", "cpu", VOCABULARY, MODEL_LEN, 4096, 0, 16, ())
    running: dict[str, list[int]] = {}
    next_step_s = time.perf_counter()
    while True:
        wait_s = max(0.0, next_step_s - time.perf_counter()) if running else None
        if select.select([channel], [], [], wait_s)[0]:
            data = channel.recv(1 << 20)
            if not data:
                return
            for command in splitter.feed(data):
                if isinstance(command, Load):
                    channel.sendall(frame(Ready(facts)))
                elif isinstance(command, Submit):
                    running[command.request.request_id] = [command.request.sampling.max_tokens, 0]
                elif isinstance(command, Abort):
                    running.pop(command.request_id, None)
        if not running or time.perf_counter() < next_step_s:
            continue
        events = []
        for request_id, state in running.items():
            state[1] += 1
            reason = "length" if state[1] == state[0] else None
            events.append(TokenEvent(request_id, 1000 + 31 * state[1] % 1000, time.perf_counter(), 0, reason))
        channel.sendall(frame(Step(tuple(events), EngineStats(num_running=len(running)))))
        for event in events:
            if event.finish_reason is not None:
                del running[event.request_id]
        if tokens_per_s:
            next_step_s = max(next_step_s + len(events) / tokens_per_s, time.perf_counter() - 0.1)


def run_server(model: str, port: int, tokens_per_s: float) -> None:
    """`hasten serve` with the stand-in for its engine process."""
    from hasten.cli.main import main
    from hasten.serve import engine_client

    engine_client.COMMAND = ("-P", __file__, model, "--pace", str(tokens_per_s), "--engine")
    main(["serve", model, "--port", str(port), "--device", "cpu", "--log-format", "text"])


async def read_stream(port: int, num_tokens: int) -> tuple[int, int]:
    """One streaming request; returns its events and bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": [5, 6, 7], "max_tokens": num_tokens, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    num_events = num_bytes = 0
    tail = b""
    while b"0\r\n\r\n" not in tail:
        data = await reader.read(1 << 16)
        if not data:
            raise SystemExit("a stream was cut")
        num_bytes += len(data)
        num_events += data.count(b"\ndata: ") + data.count(b"data: {", 0, 7)
        tail = (tail + data)[-64:]
    writer.close()
    if b"[DONE]" not in tail:
        raise SystemExit(f"a stream ended in {tail!r}")
    return num_events, num_bytes


async def read_streams(port: int, num_streams: int, num_tokens: int) -> tuple[int, int]:
    counts = await asyncio.gather(*(read_stream(port, num_tokens) for _ in range(num_streams)))
    return sum(events for events, _ in counts), sum(num_bytes for _, num_bytes in counts)


def cpu_s(pid: int) -> tuple[float, float]:
    """Seconds of CPU that a process took so far, in its own code and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / ticks_per_s, int(fields[12]) / ticks_per_s


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(arguments: argparse.Namespace) -> None:
    import uvloop

    port = free_port()
    command = [sys.executable, __file__, arguments.model, "--pace", str(arguments.pace), "--server", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        while "try it" not in (line := server.stderr.readline()):
            if not line:
                raise SystemExit("the server did not start")
        subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        uvloop.run(read_streams(port, 8, 100))
        for _ in range(arguments.runs):
            (user_s, kernel_s), start_s = cpu_s(server.pid), time.perf_counter()
            num_events, num_bytes = uvloop.run(read_streams(port, arguments.streams, arguments.tokens))
            wall_s, (user_end_s, kernel_end_s) = time.perf_counter() - start_s, cpu_s(server.pid)
            user_s, kernel_s = user_end_s - user_s, kernel_end_s - kernel_s
            used_s = user_s + kernel_s
            num_tokens = arguments.streams * arguments.tokens
            print(
                f"{num_tokens / wall_s:8.0f} tokens/s, {used_s / num_tokens * 1e6:5.1f} us of CPU a token "
                f"({kernel_s / num_tokens * 1e6:.1f} in the kernel), {used_s / wall_s:4.0%} of a core, "
                f"{num_tokens / num_events:5.2f} tokens an event, "
                f"{num_bytes / num_tokens:4.0f} bytes a token"
            )
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--pace", type=float, default=28_000.0, help="tokens a second of all streams; 0 is no limit")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each stream")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--server", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=int, nargs="?", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine is not None:
        run_engine(arguments.engine, arguments.pace)
    elif arguments.server is not None:
        run_server(arguments.model, arguments.server, arguments.pace)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
