#!/bin/sh
# onnxruntime.sh FOLDER [PYTHON]: FOLDER/include and FOLDER/lib for -DONNXRUNTIME_ROOT on Debian, nothing installed and nothing built.
# The library is the one inside PYTHON's onnxruntime wheel, the headers are those of Debian's libonnxruntime-dev.
# The headers may be older than the library, never newer: onnxruntime's C interface only grows.
set -eu
folder=${1:?usage: onnxruntime.sh FOLDER [PYTHON]}
capi=$("${2:-python3}" -c 'import importlib.util as u, os; s = u.find_spec("onnxruntime"); print(s and os.path.dirname(s.origin) + "/capi" or "")')
if [ -z "$capi" ]; then
    echo "error: expected a Python with onnxruntime, ${2:-python3} has none; name one: onnxruntime.sh FOLDER .venv/bin/python" >&2
    exit 2
fi
library=$(find "$capi" -name 'libonnxruntime.so.*' | head -n 1)
if [ -z "$library" ]; then
    echo "error: expected libonnxruntime.so inside the wheel, found none in $capi; pip install --upgrade onnxruntime" >&2
    exit 2
fi

mkdir -p "$folder/include" "$folder/lib"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
set -- -o APT::Sandbox::User=root  # the folder below is not open to the user that apt downloads as
if ! apt-cache show libonnxruntime-dev > "$work/shown" 2>&1; then
    # Debian 12 has no such package: the next release's list is read from the same mirror, the system's own lists stay as they are.
    lists=$(ls /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2> "$work/missing") || true
    mirror=$(sed -n 's/^URIs: *//p; s/^deb \([^[ ]*\) .*/\1/p' $lists | head -n 1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$work/next.list"
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    set -- "$@" -o Dir::Etc::sourcelist="$work/next.list" -o Dir::Etc::sourceparts=-
    set -- "$@" -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache"
    apt-get "$@" -qq update
fi
(cd "$work" && apt-get "$@" -qq download libonnxruntime-dev && dpkg-deb -x libonnxruntime-dev_*.deb headers)
cp "$work"/headers/usr/include/onnxruntime/onnxruntime_*.h "$folder/include"
cp "$library" "$folder/lib/libonnxruntime.so.1"  # the name that is asked for when a program starts
ln -sf libonnxruntime.so.1 "$folder/lib/libonnxruntime.so"
