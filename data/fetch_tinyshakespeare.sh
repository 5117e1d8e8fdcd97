#!/bin/sh
# fetch_tinyshakespeare.sh: 1.1 MB of Shakespeare's plays, the file that char-rnn made a yardstick, as data/tinyshakespeare.txt.
#
#     sh data/fetch_tinyshakespeare.sh && ./train_llama --data data/tinyshakespeare.txt
#
# The file is written under another name until its SHA-256 is right, so that neither a broken download nor a proxy's error page
# can ever pass for it. Runs in any POSIX shell, from any folder; does nothing if the file is already there and whole.
set -u
cd "$(dirname "$0")" || exit 1

url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
want=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
out=tinyshakespeare.txt
tmp=$out.tmp.$$

fail() { echo "fetch_tinyshakespeare.sh: $1" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# Linux has the first, macOS the second, nearly everything the third; each prints the sum last or first.
sha256() {
    if have sha256sum; then sha256sum <"$1" | cut -d' ' -f1
    elif have shasum; then shasum -a 256 <"$1" | cut -d' ' -f1
    elif have openssl; then openssl dgst -sha256 <"$1" | sed 's/.* //'
    else fail "no sha256sum, shasum or openssl to check the file with: install one of them"
    fi
}

if [ -f "$out" ]; then
    got=$(sha256 "$out") || exit 1
    [ "$got" = "$want" ] || fail "data/$out is there but is not the standard file (SHA-256 $got): move it away and run this again"
    echo "data/$out: already here, checksum right"
    exit 0
fi

trap 'rm -f "$tmp"' EXIT
trap 'exit 1' HUP INT TERM                              # a plain sh runs the line above only when it exits by itself
if have curl; then curl -fsSL -o "$tmp" "$url"
elif have wget; then wget -q -O "$tmp" "$url"
else fail "neither curl nor wget is installed: install one, or save $url as data/$out"
fi || fail "cannot download $url: check the network, or save that page as data/$out"

got=$(sha256 "$tmp") || exit 1
[ "$got" = "$want" ] || fail "what came from $url is not the standard file (SHA-256 $got): nothing was kept; try again later"
mv "$tmp" "$out" || fail "cannot write data/$out"
echo "data/$out: 1115394 bytes, checksum right"
