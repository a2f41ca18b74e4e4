import emulator
import pytest


@pytest.fixture(scope="session")
def load_emulator(tmp_path_factory):
    """Builds tests/simt/<source>.cpp once per session and loads it."""
    if not emulator.available():
        pytest.skip("the emulation needs a C++ compiler")
    folder, loaded = tmp_path_factory.mktemp("simt"), {}

    def load(source):
        if source not in loaded:
            loaded[source] = emulator.Emulator(emulator.build(source, folder))
        return loaded[source]

    return load
