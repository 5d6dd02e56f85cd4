// What Python may ask of the pool.
#include "threads/pool.h"

extern "C" {

void strop_set_num_threads(int num_threads) {
  strop::Pool::instance().resize(num_threads);
}
int strop_num_threads() { return strop::Pool::instance().num_threads(); }
int64_t strop_num_starved() { return strop::Pool::instance().num_starved(); }
}
