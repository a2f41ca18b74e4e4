"""The version matrix, as one command: `nox`. `nox -l` names its cells, `nox -s NAME` runs one.

Every cell installs the same wheel: the native libraries depend on neither the torch nor the Python version.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
WHEELS = Path("build/matrix")
# torch → its Triton, and what else belongs to it. Triton 3.6's interpreter does not know NumPy 2.4. With torchvision
# transformers picks other image processors, and has video processors.
TORCH = {
    "2.11.0": ("triton==3.6.0", "numpy<2.4"),
    "2.13.0": ("triton==3.9.0",),
    "2.14.1": ("triton==3.8.0", "torchvision==0.29.1"),
    "2.15.0": ("triton==3.9.0", "torchvision==0.29.2"),
}
TRANSFORMERS = ("5.17.0", "newest")


@nox.session
def wheel(session: nox.Session) -> None:
    """Builds ras_fast against the newest torch of the matrix."""
    session.install(f"torch=={max(TORCH)}")
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    session.run("pip", "wheel", "--no-deps", "--wheel-dir", str(WHEELS), ".")


@nox.session(requires=["wheel"])
@nox.parametrize("transformers", TRANSFORMERS)
@nox.parametrize("torch", list(TORCH))
def tests(session: nox.Session, torch: str, transformers: str) -> None:
    """Runs the tests, or what follows `--`, on the wheel."""
    (built,) = WHEELS.glob("*.whl")
    triton, *others = TORCH[torch]
    newest = transformers == "newest"
    session.install(
        f"torch=={torch}", *others, "transformers" if newest else f"transformers=={transformers}", f"{built}[calibrate,test]"
    )
    session.install("--no-deps", triton)  # torch for CUDA names one itself, torch for the CPU none
    # Neither this nor the processes that tests start may import the checkout.
    session.run("pytest", "-q", *session.posargs, env={"PYTHONSAFEPATH": "1"})
