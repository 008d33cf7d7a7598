"""Inbox: what rank 0 has said and this rank has not done yet, so that rank 0 need not wait for it to listen."""

from __future__ import annotations

import threading
from queue import SimpleQueue

from octavo_engine.parallel.channel import Channel, Command, Message


class Inbox:
    """Listens to a channel in a thread of its own, until rank 0 says stop or is gone.

    Args:
        channel: nobody else receives from it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._received: SimpleQueue[Message | Exception] = SimpleQueue()
        threading.Thread(target=self._listen, name="octavo-inbox", daemon=True).start()

    def receive(self) -> Message:
        """Return the oldest message, or wait for it.

        Raises:
            WorkerLost: rank 0 has ended.
        """
        received = self._received.get()
        if isinstance(received, Exception):
            raise received
        return received

    def _listen(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                self._received.put(message)
                if message.command is Command.STOP:
                    return
        except Exception as error:  # raised where the message is wanted
            self._received.put(error)
