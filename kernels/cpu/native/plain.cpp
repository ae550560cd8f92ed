// For any processor.
#include "kernels.h"

namespace motet {
const Kernels PLAIN = kernels();
}
