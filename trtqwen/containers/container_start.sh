# Runs trtqwen in NVIDIA's image, in a virtual environment that adds what the image lacks. Arguments: trtqwen's.
#
# The image's packages may lie in a virtual environment of their own, first on PATH. One made from it would see the
# packages of the base Python instead, so the new one is told where python3 finds its own.
set -f
work=$PWD
cd / || exit  # Python looks for modules in the working directory
home=/opt/trtqwen-venv # made when the image was built
made_for=$TRTQWEN_REQUIRES
is_ready() { [ "$(cat "$home/ready" 2>/dev/null)" = "$made_for" ]; }
if ! is_ready; then
  home=${TRTQWEN_CACHE:-/var/cache/trtqwen}
  [ "$home" = /opt/trtqwen-venv ] || made_for="$TRTQWEN_REQUIRES $TRTQWEN_IMAGE_DIGEST" # a tag can be pushed again
fi
if ! is_ready; then
  mkdir -p "$home" || exit
  (
    flock 9 || exit
    is_ready && exit
    echo "preparing trtqwen's environment in this image; the next start takes it as it is" >&2
    rm -rf "$home/venv" "$home/ready"
    python3 -m venv --without-pip "$home/venv" || exit
    site=$("$home/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || exit
    python3 -c '
import sys
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")
' >"$site/image.pth" || exit
    # The versions of the host, except of what the image brings itself.
    python3 -c '
import os
from importlib import metadata
for pin in os.environ.get("TRTQWEN_PINS", "").split():
    try:
        metadata.version(pin.partition("==")[0])
    except metadata.PackageNotFoundError:
        print(pin)
' >"$home/pins" || exit
    python3 -m pip --python "$home/venv/bin/python" install --quiet --constraint "$home/pins" $TRTQWEN_REQUIRES >&2 ||
      exit
    python3 -c '
import sys
from importlib import metadata
added = (f"{package.name} {package.version}" for package in metadata.distributions(path=sys.argv[1:]))
print("installed what the image lacks:", ", ".join(sorted(added)) or "nothing", file=sys.stderr)
' "$site"
    echo "$made_for" >"$home/ready"
  ) 9>"$home/lock" || exit
fi
cd "$work" || exit
exec "$home/venv/bin/python" -m trtqwen "$@"
