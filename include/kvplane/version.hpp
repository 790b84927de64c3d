// kvplane/version.hpp: the one place where the version stands. CMakeLists.txt reads it from here.
#pragma once

#define KVPLANE_VERSION_MAJOR 0
#define KVPLANE_VERSION_MINOR 1
#define KVPLANE_VERSION_PATCH 0
