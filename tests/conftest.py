import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_addoption(parser):
    # pytest itself has a --fixtures (list fixtures; also reachable as --funcargs): ours replaces it.
    parser.optparser.conflict_handler = "resolve"
    group = parser.getgroup("vla_jax")
    group.addoption("--fixtures", metavar="DIR", help="folder of golden outputs for tests/parity")
    parser.optparser.conflict_handler = "error"
