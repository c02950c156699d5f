"""A pretended GPU for tests of the order of copies: it notes what is asked of it, and is done when it is told."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from distillery.reading import loader, stream
from distillery.training import batches


class FakeCuda:
    """What torch.cuda is asked, in order, as `calls`.

    registered: address -> bytes of the memory locked now; unlocked: addresses, in order; refuses: whether locking
    fails; is_done: whether the copies begun so far have been made.
    """

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple] = []
        self.registered: dict[int, int] = {}
        self.unlocked: list[int] = []
        self.devices: list[int] = []
        self.refuses, self.is_done, self.num_streams = False, True, 0
        fake, to = self, torch.Tensor.to

        class Stream:
            def __init__(self, device=None):
                fake.num_streams += 1

            def wait_event(self, event):
                fake.calls.append(("wait", event.number))

        class Event:
            def __init__(self):
                self.number = sum(call[0] == "record" for call in fake.calls)

            def record(self, _stream):
                fake.calls.append(("record", self.number))

            def query(self):
                return fake.is_done

        @contextmanager
        def on_stream(_stream):
            fake.calls.append(("stream", "copy"))
            yield
            fake.calls.append(("stream", "compute"))

        @contextmanager
        def on_device(device):
            fake.devices.append(getattr(device, "index", device))
            yield

        def to_device(tensor, *arguments, **options):
            if not arguments or getattr(arguments[0], "type", None) != "cuda":
                return to(tensor, *arguments, **options)
            assert options == {"non_blocking": True}
            fake.calls.append(("copy", tensor.data_ptr()))
            return tensor.clone()

        compute, cudart = Stream(), SimpleNamespace(cudaHostRegister=self._lock, cudaHostUnregister=self._unlock)
        self.num_streams = 0
        for name, value in {
            "Stream": Stream, "Event": Event, "stream": on_stream, "device": on_device, "cudart": lambda: cudart,
            "current_stream": lambda _device=None: compute, "current_device": lambda: 3,
            "is_available": lambda: True, "is_initialized": lambda: True,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "to", to_device)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: self.calls.append(("keep",)))
        self.forget()

    @staticmethod
    def forget() -> None:
        """Forget what is kept for the whole process."""
        for cache in (loader.copies_to, stream.say_once, batches._page_locked_memory):
            cache.cache_clear()

    def _lock(self, address: int, num_bytes: int, flags: int) -> int:
        assert flags == 0 and address not in self.registered
        if self.refuses:
            return 2
        self.registered[address] = num_bytes
        return 0

    def _unlock(self, address: int) -> int:
        del self.registered[address]
        self.unlocked.append(address)
        return 0

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]
