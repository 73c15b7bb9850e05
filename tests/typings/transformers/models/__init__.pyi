# The real one imports every model there is, which takes pyright longer than all of our own code.
from typing import Any

def __getattr__(name: str) -> Any: ...
