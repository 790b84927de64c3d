// Compiled with flags that kvplane refuses: the lowest header is enough to be told.
#include "kvplane/error.hpp"
