#!/usr/bin/env bash
# Builds everything and runs all tests. usage: test.sh [ctest option...]
. "$(dirname "$0")/common.sh"

scripts/setup.sh test
scripts/build.sh all
exec ctest --test-dir build --output-on-failure -j2 "$@"
