#ifndef PRISMAQUANT_MODEL_CONFIG_ROPE_H_
#define PRISMAQUANT_MODEL_CONFIG_ROPE_H_

// The rotary settings of a configuration. They stand in "rope_parameters" (new), or in "rope_theta"
// and "rope_scaling" (old). Where sliding layers turn by angles of their own, "rope_parameters" has
// an object per layer type, and "rope_local_base_freq" (old) is the sliding layers' rope_theta.

#include "model/config.h"
#include "model/config_reader.h"

namespace prismaquant {

struct RopeKeys {
  double fraction = 1;          // default of partial_rotary_factor
  bool partial_rotary = false;  // a fraction below 1 is implemented
  double theta = 10000;         // default of rope_theta
  double local_theta = 0;       // default of rope_local_base_freq; 0: no angles of their own
  bool sections = false;        // "mrope_section" gives rows and columns frequencies of their own
};

// Sets rope_theta, rotary_dim (from head_dim), rope_factor, rope_scaling, local_rope_theta and the
// frequencies of rows and columns.
// Errors go to `body`.
void ParseRope(ConfigReader& body, const RopeKeys& keys, ModelConfig& config);

}  // namespace prismaquant

#endif  // PRISMAQUANT_MODEL_CONFIG_ROPE_H_
