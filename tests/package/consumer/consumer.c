#include <kvplane/c/kvplane.h>
#include <stdio.h>

int main(void) {
    puts(kvplane_version());
    return 0;
}
