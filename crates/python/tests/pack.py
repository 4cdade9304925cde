"""Packs the package and a library that Cargo has built into a wheel, and prints its path.

The release wheel is made by maturin, which builds the library itself. For the tests that would compile all dependencies a second
time, because Cargo selects other features for one package than for the workspace.

usage: pack.py LIBRARY FOLDER
"""

import base64
import hashlib
import pathlib
import sys
import sysconfig
import zipfile

METADATA = "Metadata-Version: 2.1\nName: ternion\nVersion: {version}\nRequires-Python: >=3.9\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: pack.py\nRoot-Is-Purelib: false\nTag: {tag}\n"


def main(library: str, folder: str) -> None:
    version = "0.0.0"  # The native module tells the version of the crate.
    tag = "cp39-abi3-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
    info = f"ternion-{version}.dist-info"
    source = pathlib.Path(__file__).parents[1] / "python"
    files = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in sorted(source.rglob("*"))
        if path.suffix in {".py", ".pyi", ".typed"}
    }
    extension = ".pyd" if sys.platform == "win32" else ".abi3.so"
    files[f"ternion/_native{extension}"] = pathlib.Path(library).read_bytes()
    files[f"{info}/METADATA"] = METADATA.format(version=version).encode()
    files[f"{info}/WHEEL"] = WHEEL.format(tag=tag).encode()
    record = "".join(f"{name},sha256={digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    wheel = pathlib.Path(folder) / f"ternion-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    print(wheel)


def digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    main(*sys.argv[1:])
