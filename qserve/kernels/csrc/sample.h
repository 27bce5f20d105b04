// The next token of each row of logits: the likeliest, or one drawn from what temperature, top-k, top-p and min-p leave.
#pragma once
#include <cstdint>

#include "team.h"

namespace qserve {

// How one row's token is chosen; a row of `draws` in ops.py.
struct Draw {
  double temperature;  // 0: the likeliest, of equals the first
  double number;       // in [0, 1): put through the cumulative distribution of what is left
  double top_k;        // a whole number; 0: all
  double top_p;
  double min_p;
};

struct Sampling {
  const float* logits;  // (rows, stride), of which `vocabulary` columns count
  const Draw* draws;    // (rows,)
  int64_t* tokens;      // (rows,): the result
  int64_t rows;
  int64_t stride;
  int64_t vocabulary;
};

void sample_rows(const Sampling& sampling, Team& team);

}  // namespace qserve
