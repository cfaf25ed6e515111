"""`python -m operators.native`: compile the core if it is not there, and say where it lies."""

from operators.native.build import build

if __name__ == "__main__":
    try:
        print(build())
    except RuntimeError as error:
        raise SystemExit(f"No compiled core: {error}. Everything works without it, in torch.") from error
