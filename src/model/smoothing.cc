#include "model/smoothing.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <cstdlib>
#include <set>
#include <utility>

#include "model/checkpoint_tensors.h"
#include "model/model.h"

namespace prismaquant {
namespace {

constexpr char kZero = 'g';

struct SmoothedNorm {
  std::map<std::string, at::Tensor> tensors;
  at::Tensor factors;  // float32 [channels], what its output was divided by
};

Result<SmoothedNorm> DivideNorm(const Checkpoint& checkpoint, const SmoothingSite& site,
                                const at::Tensor& factors) {
  SmoothedNorm smoothed{.tensors = {}, .factors = factors};
  for (const std::string& name : site.norm) {
    PQ_ASSIGN_OR_RETURN(const at::Tensor stored, checkpoint_tensors::Map(checkpoint, name));
    const at::Tensor wide = stored.to(at::kFloat);
    at::Tensor& tensor = smoothed.tensors[name];
    if (site.plus_one) {
      const at::Tensor divided = ((1 + wide) / factors - 1).to(stored.scalar_type());
      const at::Tensor gain = 1 + divided.to(at::kFloat);
      const at::Tensor scaled = at::logical_and(gain != 0, factors != 1);
      tensor = at::where(scaled, divided, stored);
      smoothed.factors = at::where(scaled, (1 + wide) / gain, at::ones_like(wide));
    } else {
      tensor = (wide / factors).to(stored.scalar_type());
    }
    PQ_RETURN_IF_ERROR(checkpoint_tensors::RequireFinite(checkpoint, name + ", smoothed,", tensor));
  }
  return smoothed;
}

}  // namespace

Json SmoothingToJson(const SmoothingExponents& exponents) {
  Json json = Json::object();
  for (const auto& [site, values] : exponents) {
    std::string letters;
    for (const int8_t value : values) letters += static_cast<char>(kZero + value);
    json[site] = letters;
  }
  return json;
}

Result<SmoothingExponents> ParseSmoothing(const Json& json, const std::string& origin) {
  const auto malformed = [&](const std::string& found) {
    return Status::InvalidInput(
        fmt::format("{}: smoothing is {}, expected a word of the letters {} to {} per site", origin,
                    found, static_cast<char>(kZero - kLargestSmoothingExponent),
                    static_cast<char>(kZero + kLargestSmoothingExponent)));
  };
  if (!json.is_object()) return malformed(json.type_name());
  SmoothingExponents exponents;
  for (const auto& [site, letters] : json.items()) {
    if (!letters.is_string()) return malformed(fmt::format("{} at {}", letters.type_name(), site));
    std::vector<int8_t>& values = exponents[site];
    for (const char letter : letters.get<std::string>()) {
      const int value = letter - kZero;
      if (std::abs(value) > kLargestSmoothingExponent) {
        return malformed(fmt::format("byte {} at {}", static_cast<int>(letter), site));
      }
      values.push_back(static_cast<int8_t>(value));
    }
  }
  return exponents;
}

std::vector<int8_t> ChooseExponents(const at::Tensor& mean_square) {
  const at::Tensor alive = mean_square > 0;
  std::vector<int8_t> exponents(static_cast<size_t>(mean_square.numel()), 0);
  if (!alive.any().item<bool>()) return exponents;
  const at::Tensor logarithm = mean_square.to(at::kDouble).log2() / 4;
  const at::Tensor median = logarithm.masked_select(alive).median();
  const at::Tensor chosen = at::where(alive, logarithm - median, at::zeros_like(logarithm))
                                .round()
                                .clamp(-kLargestSmoothingExponent, kLargestSmoothingExponent)
                                .to(at::kChar)
                                .contiguous();
  exponents.assign(chosen.const_data_ptr<int8_t>(),
                   chosen.const_data_ptr<int8_t>() + chosen.numel());
  return exponents;
}

Status Smoothing::Add(const Checkpoint& checkpoint, const SmoothingSite& site,
                      const std::vector<int8_t>& exponents) {
  if (static_cast<int64_t>(exponents.size()) != site.channels) {
    return Status::InvalidInput(fmt::format("smoothing of {}: {} channels, expected {}", site.key(),
                                            exponents.size(), site.channels));
  }
  at::Tensor factors = at::exp2(at::tensor(exponents, at::kChar).to(at::kFloat));
  if (site.norm.empty()) {
    at::Tensor& rows = rows_[site.producer];
    if (!rows.defined()) rows = at::ones({site.rows});
    rows.narrow(0, site.row, site.channels).copy_(factors.reciprocal());
  } else {
    PQ_ASSIGN_OR_RETURN(SmoothedNorm norm, DivideNorm(checkpoint, site, factors));
    factors = norm.factors;
    parameters_.merge(norm.tensors);
  }
  const at::Tensor columns =
      site.channel_of.defined() ? factors.index_select(0, site.channel_of) : factors;
  for (const std::string& reader : site.readers) columns_[reader] = columns;
  return {};
}

Result<std::shared_ptr<const Smoothing>> Smoothing::Make(const Model& model,
                                                         SmoothingExponents exponents) {
  const auto smoothing = std::make_shared<Smoothing>();
  std::set<std::string> used;
  for (int layer = 0; layer < model.num_layers(); ++layer) {
    for (const SmoothingSite& site : model.SmoothingSites(layer)) {
      const auto chosen = exponents.find(site.key());
      if (chosen == exponents.end()) continue;
      used.insert(site.key());
      PQ_RETURN_IF_ERROR(smoothing->Add(model.checkpoint(), site, chosen->second));
    }
  }
  for (const auto& [site, values] : exponents) {
    if (used.count(site) > 0) continue;
    return Status::InvalidInput(
        fmt::format("smoothing of {}: the model has no channels of that name", site));
  }
  for (const auto& [name, tensor] : smoothing->parameters_) smoothing->changed_[name] = {};
  for (size_t i = 0; i < model.linears().size(); ++i) {
    const LinearInfo& linear = model.linears()[i];
    const bool divided = smoothing->rows_.count(linear.name) > 0;
    if (!divided && smoothing->columns_.count(linear.name) == 0) continue;
    const std::string& packed = linear.packed.tensor;
    smoothing->changed_[packed.empty() ? linear.name + ".weight" : packed].push_back(i);
    if (divided && linear.has_bias) smoothing->changed_[linear.name + ".bias"].push_back(i);
  }
  smoothing->exponents_ = std::move(exponents);
  return std::shared_ptr<const Smoothing>(smoothing);
}

at::Tensor Smoothing::Weight(const std::string& linear, const at::Tensor& stored) const {
  const auto rows = rows_.find(linear), columns = columns_.find(linear);
  if (rows == rows_.end() && columns == columns_.end()) return stored;
  at::Tensor weight = stored.to(at::kFloat);
  if (columns != columns_.end()) weight = weight * columns->second;
  if (rows != rows_.end()) weight = weight * rows->second.unsqueeze(1);
  return weight.to(stored.scalar_type());
}

at::Tensor Smoothing::Bias(const std::string& linear, const at::Tensor& stored) const {
  const auto rows = rows_.find(linear);
  if (rows == rows_.end()) return stored;
  return (stored.to(at::kFloat) * rows->second).to(stored.scalar_type());
}

const at::Tensor* Smoothing::Parameter(const std::string& tensor) const {
  const auto found = parameters_.find(tensor);
  return found == parameters_.end() ? nullptr : &found->second;
}

Result<at::Tensor> LoadSmoothed(const Checkpoint& checkpoint, const Smoothing* smoothing,
                                const std::string& tensor, at::ScalarType dtype,
                                at::Device device) {
  const at::Tensor* smoothed = smoothing == nullptr ? nullptr : smoothing->Parameter(tensor);
  if (smoothed == nullptr) return checkpoint_tensors::Load(checkpoint, tensor, dtype, device);
  return smoothed->to(device, dtype, /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace prismaquant
