#!/bin/sh
# Debian packages that the browser tests need. Without root the tests that need them skip.
set -u
command -v chromium >/dev/null 2>&1 && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        chromium fonts-noto-cjk) >/dev/null 2>&1 || echo "chromium could not be installed; browser tests will skip"
else
    echo "chromium is not installed; browser tests will skip"
fi
