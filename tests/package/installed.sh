#!/usr/bin/env bash
# Installs a build into a folder of its own, builds a consumer against it with find_package and another with
# pkg-config, and runs both. Arguments: build folder, consumer's source, compiler, version.
set -euo pipefail
build=$1 source=$2 compiler=$3 version=$4
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cmake --install "$build" --prefix "$folder/prefix" >/dev/null
cmake -S "$source" -B "$folder/build" -DCMAKE_PREFIX_PATH="$folder/prefix" -DCMAKE_CXX_COMPILER="$compiler" >/dev/null
grep -q "$folder/prefix" "$folder/build/CMakeCache.txt"
cmake --build "$folder/build" >/dev/null
"$folder/build/consumer"
[ ! -e "$folder/prefix/include/kvplane/README.md" ]
if [ -n "$(find "$folder/prefix" -name libkvplane_compiled.a)" ]; then
    "$folder/build/compiled_consumer"
fi

export PKG_CONFIG_PATH=$folder/prefix/share/pkgconfig
[ "$(pkg-config --modversion kvplane)" = "$version" ]
# shellcheck disable=SC2046
"$compiler" $(pkg-config --cflags kvplane) "$source/consumer.cpp" -o "$folder/plain"
"$folder/plain"

if pkg-config --exists kvplane-c; then
    library=$(pkg-config --variable=libdir kvplane-c)
    # shellcheck disable=SC2046
    cc -std=c99 "$source/consumer.c" $(pkg-config --cflags --libs kvplane-c) -o "$folder/from_c"
    [ "$(LD_LIBRARY_PATH=$library "$folder/from_c")" = "$version" ]
fi
