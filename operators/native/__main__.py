"""`python -m operators.native`: compile the core if it is not there, and say where it lies."""

from operators.native.build import build

if __name__ == "__main__":
    try:
        print(f"compiled core: {build()}")
    except RuntimeError as error:
        raise SystemExit(f"no compiled core, everything runs in torch: {error}") from error
