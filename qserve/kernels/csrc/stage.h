// What Python tells the kernels: plain structures of pointers and numbers, mirrored field by field in stages.py.
// Nothing here is owned: whoever fills a structure keeps the tensors it points into.
#pragma once
#include <cstdint>

namespace qserve {

enum Form : int32_t { kInt4 = 0, kInt8 = 1, kFloat = 2 };
enum ActivationForm : int32_t { kExact = 0, kAsymmetric = 1, kSymmetric = 2, kFloat8 = 3 };

// One packed weight. Output channels stand in tiles of 16, see packing.py for the drawings.
struct Weight {
  const uint8_t* codes;
  const void* scales;      // (tiles, groups, 16) of scale_type; null for plain float weights
  const float* units;      // (tiles, 16): `scales` are int16 multiples of these, see aligned.h; or null
  const uint8_t* zeros;    // (tiles, groups, 16), in the units of the unsigned codes; null where all are code_bias
  const void* offsets;     // (tiles, groups, 16) of offset_type, or null
  const void* fix;         // (tiles, 16) float, or int32 with units: what one unit of an input's zero point adds, or null
  const float* pre_scale;  // (in_features,) or null
  int32_t form;            // Form
  int32_t value_type;      // FloatType of the codes of a float weight
  int32_t scale_type;      // FloatType
  int32_t offset_type;     // FloatType
  int32_t activation;      // ActivationForm
  int32_t planes;          // int8 (or bf16) numbers that stand for one input
  int32_t out_features;
  int32_t in_features;
  int32_t group_size;
  int32_t padded_group;  // group_size rounded up to what the layout needs; the rest is zeros
  int32_t groups;
  int32_t code_bias;  // the unsigned code of the value zero
  int32_t column;     // of the output, where this weight's channels begin
  int32_t is_narrow;  // with units: no channel's sum over any inputs leaves 32 bits

  int tiles() const { return (out_features + 15) / 16; }
  int padded_features() const { return padded_group * groups; }

  // Whether exact inputs have a scale for each group: then sums of both planes fit in 32 bits together.
  bool has_group_inputs() const {
    constexpr int kLongest = 256;
    return planes == 2 && units == nullptr && groups > 1 && group_size <= kLongest;
  }
};

struct Linear {
  const Weight* weights;
  const float* bias;  // (out_features,) or null
  int32_t num_weights;
  int32_t in_features;
  int32_t out_features;
  int32_t is_paired;  // channels of gates and of the others in tiles by turns; else first all of the one, then the other
};

struct Norm {
  const float* weight;
  const float* bias;  // or null
  float eps;
  int32_t is_layer;  // takes the mean away
  int32_t size;
};

struct Attention {
  const Norm* query_norm;  // or null
  const Norm* key_norm;
  const float* cos;  // (positions, half), or null: nothing turns
  const float* sin;
  int32_t half;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t window;  // keys that a query sees, itself included; 0: all
  float scale;
  float soft_cap;  // 0: none

  int heads_per_kv() const { return num_heads / num_kv_heads; }
};

constexpr int32_t kCodes = 5;  // beside FloatType: int8, times a scale

struct Cache {
  void* keys;  // (blocks, kv_heads, block_size * head_dim) of type, laid out as cache_layout.h says
  void* values;
  float* key_scales;  // (blocks, kv_heads, block_size) with kCodes, else null
  float* value_scales;
  int64_t head_bytes;  // from one kv head of a block to the next, in each of the four
  int32_t type;        // kF32, kBF16 or kCodes
  int32_t block_size;
};

// The rows of one step; refilled before each replay of a recorded step.
struct Step {
  const int64_t* token_ids;
  const int64_t* positions;
  const int64_t* slots;
  const int32_t* query_starts;
  const int32_t* context_lens;
  const int32_t* block_tables;
  int32_t tokens;
  int32_t chunks;
  int32_t max_blocks;
};

enum StageKind : int32_t { kEmbed = 0, kLinear = 1, kRotate = 2, kAttend = 3, kSelect = 4 };
enum Gate : int32_t { kNoGate = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4 };

struct Stage {
  const void* input;      // float (rows, features); a table for kEmbed
  float* output;          // float (rows, features)
  const float* residual;  // float (rows, features), may be the output; or null
  const int64_t* index;   // row numbers for kSelect
  const Linear* linear;
  const Norm* norm;       // of the input, or null
  const Norm* post_norm;  // of the linear's output, or null
  const Attention* attention;
  const Cache* cache;
  const Step* step;
  int32_t kind;         // StageKind
  int32_t rows;         // of the output
  int32_t input_stride;   // floats from one row of the input to the next; not of kEmbed's and kSelect's tables
  int32_t output_stride;  // the same of the output, and of the residual
  int32_t width;        // columns of the output of kEmbed and kSelect
  int32_t table_type;   // FloatType of kEmbed's table
  int32_t gate;         // Gate: outputs are gates and what they are multiplied with, and half as many columns remain
  float scale;          // of the linear's output, or of an embedded row
  float soft_cap;       // 0: none
};

}  // namespace qserve
