"""The engine process: one per device; only engine processes import torch.

    python -m app.engine.process --socket-fd N

Exits with 0 when drained, 1 after a crash, 2 when the model is unusable, 3 when the device is lost. It never
outlives its parent: when the socket closes it exits, in the middle of a step if need be.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from enum import IntEnum
from queue import SimpleQueue
from typing import NoReturn

import msgspec

from app.engine.contract import AnyRunner
from app.engine.cost import CostModel
from app.engine.engine import Engine, HungUp, Inbox
from app.engine.protocol import AnyToEngine, Configure, DeviceLost, Unusable, to_engine
from app.engine.pulse import Pulse
from app.engine.scheduler import Scheduler
from app.engine.transport import Transport
from app.errors import DeviceGone, ModelUnusable
from app.jobs.faults import Faults
from app.logs import Logger, make_logger
from app.settings import Settings


class Exit(IntEnum):
    """Exit status of an engine process, for its parent."""

    DRAINED = 0
    CRASHED = 1
    UNUSABLE = 2
    DEVICE_LOST = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Run an engine: the entry point of `python -m app.engine.process`."""
    parser = argparse.ArgumentParser(description="An engine; the server starts it.")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="json")
    options = parser.parse_args(arguments)
    settings = {"log_level": options.log_level, "log_format": options.log_format}
    # Not from the environment: the settings there are the server's, and checked by it.
    logger = make_logger(Settings.model_construct(**settings))

    from app.engine.runner import CascadeRunner

    be_engine(socket.socket(fileno=options.socket_fd), CascadeRunner(), logger)


def be_engine(sock: socket.socket, runner: AnyRunner, logger: Logger) -> NoReturn:
    """Turn this process into an engine."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # meant for the parent, which drains us or hangs up
    exit_now(serve(sock, runner, logger=logger, orphaned=lambda: exit_now(Exit.CRASHED)))


def exit_now(code: Exit) -> NoReturn:
    """End the process without waiting for its threads, or for a dying device."""
    sys.stderr.flush()
    os._exit(code)


def serve(
    sock: socket.socket, runner: AnyRunner, *, logger: Logger, orphaned: Callable[[], None] = lambda: None
) -> Exit:
    """Serve what comes over `sock` to its end; `orphaned` is called when the other end hangs up early."""
    transport = Transport(sock, to_engine)
    pulse = Pulse(runner, transport.send, time.monotonic)
    try:
        configure = transport.receive()
        if not isinstance(configure, Configure):
            raise ValueError("the first message must be the configuration")
        return _serve(configure, runner, transport, pulse, logger, orphaned)
    except DeviceGone as error:
        logger.error("the device is lost", exc_info=error)
        transport.send(DeviceLost(str(error)))
        return Exit.DEVICE_LOST
    except Exception as error:
        logger.error("the engine crashed", exc_info=error)
        return Exit.CRASHED
    finally:
        pulse.stop()
        transport.close()


def _serve(
    configure: Configure,
    runner: AnyRunner,
    transport: Transport[AnyToEngine],
    pulse: Pulse,
    logger: Logger,
    orphaned: Callable[[], None],
) -> Exit:
    inbox: Inbox = SimpleQueue()
    threading.Thread(
        target=_read, args=(transport, inbox, logger, orphaned), name="reader", daemon=True
    ).start()
    pulse.start()
    try:
        ready = runner.load(configure)
    except DeviceGone:
        raise
    except Exception as error:
        if not isinstance(error, ModelUnusable):  # whose reason says it all, and is logged by the parent
            logger.error("the model cannot be loaded", exc_info=error)
        transport.send(Unusable(str(error)))
        return Exit.UNUSABLE
    transport.send(ready)
    cost = CostModel()
    cost.learn_profile(ready.step_seconds)
    Engine(
        runner,
        Scheduler(runner.cap, configure.weights),
        cost,
        inbox=inbox,
        send=transport.send,
        pulse=pulse,
        faults=Faults(configure.faults),
        clock=time.monotonic,
        logger=logger,
    ).run()
    return Exit.DRAINED


def serve_in_thread(sock: socket.socket, runner: AnyRunner, *, logger: Logger) -> Future[Exit]:
    """Run `serve` in a thread of this process, for tests. It ends after the step when the socket closes."""
    ended: Future[Exit] = Future()

    def run() -> None:
        try:
            ended.set_result(serve(sock, runner, logger=logger))
        except BaseException:  # raised by a test's runner that imitates a killed process
            ended.set_result(Exit.CRASHED)

    threading.Thread(target=run, name="engine", daemon=True).start()
    return ended


def _read(
    transport: Transport[AnyToEngine], inbox: Inbox, logger: Logger, orphaned: Callable[[], None]
) -> None:
    """Put messages into the inbox until the other end is gone or sends anything else."""
    try:
        while (message := transport.receive()) is not None:
            inbox.put(message)
    except (ValueError, msgspec.DecodeError) as error:
        logger.error("not a message", exc_info=error)
    inbox.put(HungUp())
    if not transport.is_closed:
        orphaned()


if __name__ == "__main__":
    main()
