// Greedy max-min picks from distances of rounded products (rounded_cpu.h), each known up to `off`, and exact ones where they decide.
//
// Every token's distance to the nearest pick lies in [lower, best]. The pick is the token with the largest best, once that equals its lower;
// until then it gets the exact distances to those picks that may be its nearest, each pair at most once. Exact products have the additions
// of dot_tile_cpu.h in the same order, so the picks are those of the float path, bit for bit.
// Tokens that are closer to each other than `off` need many exact products: past a quarter of the float path's time it takes over.
#pragma once

#include "similarity/diverse_image_cpu.h"
#include "similarity/rounded_cpu.h"

TS_ISA_BEGIN

namespace {
namespace filter {

// One row scaled to norm 1, and its products with others. Lanes are blocks of 128 channels, whose chains do not wait for each other.
template <typename T>
class ExactRow {
 public:
  void set(const T* row, float factor, int64_t C) {
    const int64_t whole = C / dots::kDims * dots::kDims;
    for (int64_t c = 0; c < whole; c += kGroup) pack_group(row + c, blocks_of(whole - c), factor, own_ + c);
    scale(row + whole, C - whole, factor, own_ + dot_round_up(whole, kGroup));
  }

  float dot(const T* other, float factor, int64_t C) const {
    alignas(64) float packed[kGroup], lane[kLanes];
    const int64_t whole = C / dots::kDims * dots::kDims;
    float total = 0.0f;
    for (int64_t c = 0; c < whole; c += kGroup) {
      const int64_t blocks = blocks_of(whole - c);
      pack_group(other + c, blocks, factor, packed);
      Vec sum = zero();
      for (int64_t i = 0; i < kGroup; i += kLanes) sum = fma(load(own_ + c + i), load(packed + i), sum);
      store(lane, sum);
      for (int64_t j = 0; j < blocks; ++j) total = c + j == 0 ? lane[j] : total + lane[j];
    }
    if (C == whole) return total;
    const float* const rest = own_ + dot_round_up(whole, kGroup);
    scale(other + whole, C - whole, factor, packed);
    Vec sum = zero();
    for (int64_t i = 0; i < C - whole; ++i) sum = fma(splat(rest[i]), splat(packed[i]), sum);
    store(lane, sum);
    return whole == 0 ? lane[0] : total + lane[0];
  }

 private:
  static constexpr int64_t kGroup = dots::kDims * kLanes;

  static int64_t blocks_of(int64_t channels) { return smaller(channels / dots::kDims, kLanes); }

  // Blocks side by side: to[d][block]; behind the last one, that again.
  static void pack_group(const T* row, int64_t blocks, float factor, float* to) {
    const T* block[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) block[j] = row + smaller(j, blocks - 1) * dots::kDims;
    dots::pack(block, 0, dots::kDims, to);
    for (int64_t i = 0; i < kGroup; i += kLanes) store(to + i, mul(load(to + i), splat(factor)));
  }

  static void scale(const T* row, int64_t n, float factor, float* to) {
    for (int64_t i = 0; i < n; i += kLanes) store(to + i, mul(load_upto(row + i, n - i), splat(factor)));
  }

  alignas(64) float own_[rounded::kMostChannels + dots::kDims];
};

// How far off any distance of the image's rounded products is; negative where that is not bounded, or where it decides nothing.
template <typename T>
float largest_difference(const DiverseParams& p, const Image& image) {
  float e = 0.0f;
  for (int64_t i = 0; i < image.n; ++i) e = image.error[i] > e ? image.error[i] : e;
  const double off = rounded::largest_difference(e, e, p.C) + 1e-6;  // 1e-6: distances and bounds are rounded to float
  if (!(off < 0.25)) return -1.0f;
  // Tokens that are all alike, by 16 pairs: found out by the picks, it would cost 1.7 times the float path.
  int close = 0;
  for (int64_t s = 0; s < 16 && image.n >= 32; ++s) {
    const int64_t i = s * image.n / 32, j = i + image.n / 2;
    ExactRow<T> row;
    row.set(token_row<T>(p, image, i), image.inverse[i], p.C);
    close += 1.0f - row.dot(token_row<T>(p, image, j), image.inverse[j], p.C) < 4.0 * off;
  }
  return close > 8 ? -1.0f : static_cast<float>(off);
}

template <typename T>
class Picker {
 public:
  Picker(const DiverseTask& t, const Image& image)
      : t_(t), image_(image), off_(image.state->off), left_(256 + image.n * image.n / 256), padded_(dot_round_up(image.n, kLanes)) {}

  // False: too many exact products; nothing that counts is written.
  bool run() {
    const DiverseParams& p = t_.p;
    const int64_t picks = smaller(p.K, image_.n);
    int64_t last = picks > 0 ? given_first(p, image_) : 0;
    if (last < 0 && !most_isolated(&last)) return false;
    for (int64_t i = 0; i < padded_; ++i) {
      image_.best[i] = image_.lower[i] = i < image_.n ? kInfinity : -1.0f;
      image_.seen[i] = 0;
    }
    for (done_ = 0; done_ < picks;) {
      p.index[image_.b * p.K + done_] = image_.tokens[last];
      image_.picked[done_++] = static_cast<int32_t>(last);
      image_.best[last] = image_.lower[last] = -1.0f;
      narrow(image_.distances + last * t_.at.rows);
      if (done_ < picks && !farthest(&last)) return false;
    }
    write_picks(p, image_, picks);
    return true;
  }

 private:
  // Distances to one more pick.
  void narrow(const float* row) {
    const Vec off = splat(off_);
    for (int64_t i = 0; i < padded_; i += kLanes) {
      const Vec d = load(row + i);
      store(image_.best + i, min(add(d, off), load(image_.best + i)));
      store(image_.lower + i, min(sub(d, off), load(image_.lower + i)));
    }
  }

  bool known(int64_t i) const { return image_.lower[i] == image_.best[i]; }

  bool farthest(int64_t* pick) {
    for (;;) {
      *pick = update_and_pick(image_.best, nullptr, padded_);
      if (known(*pick)) return true;
      if (!measure(*pick)) return false;
    }
  }

  // The distance of token i to its nearest pick: exact ones to the picks since the last time that may be it.
  bool measure(int64_t i) {
    const float* const row = image_.distances + i * t_.at.rows;
    bool set = false;
    float nearest = image_.best[i];  // an exact one, or above that of a pick which is measured here
    for (int32_t s = image_.seen[i]; s < done_; ++s) {
      const int64_t pick = image_.picked[s];
      if (row[pick] - off_ <= nearest && !exact(i, pick, &set, &nearest)) return false;
    }
    image_.seen[i] = static_cast<int32_t>(done_);
    image_.best[i] = image_.lower[i] = nearest;
    return true;
  }

  // The first pick: the distance to the nearest other token.
  bool most_isolated(int64_t* pick) {
    find_nearest(t_, image_);
    for (int64_t i = 0; i < padded_; i += kLanes) {
      const Mask real = first_lanes(image_.n - i);
      const Vec d = load(image_.best + i);
      store(image_.lower + i, select(real, sub(d, splat(off_)), d));
      store(image_.best + i, select(real, add(d, splat(off_)), d));
    }
    for (;;) {
      *pick = update_and_pick(image_.best, nullptr, padded_);
      if (known(*pick)) return true;
      if (!measure_to_all(*pick)) return false;
    }
  }

  bool measure_to_all(int64_t i) {
    const float* const row = image_.distances + i * t_.at.rows;
    bool set = false;
    float nearest = image_.best[i];
    for (int64_t j = 0; j < image_.n; j += kLanes) {
      Mask maybe = ~greater(sub(load(row + j), splat(off_)), splat(nearest)) & first_lanes(image_.n - j);
      for (; maybe; maybe &= maybe - 1) {
        const int64_t other = j + __builtin_ctz(maybe);
        if (other != i && !exact(i, other, &set, &nearest)) return false;
      }
    }
    image_.best[i] = image_.lower[i] = nearest;
    return true;
  }

  bool exact(int64_t i, int64_t j, bool* set, float* nearest) {
    if (--left_ < 0) return false;
    if (!*set) row_.set(token_row<T>(t_.p, image_, i), image_.inverse[i], t_.p.C);
    *set = true;
    const Vec dot = splat(row_.dot(token_row<T>(t_.p, image_, j), image_.inverse[j], t_.p.C));
    float lane[kLanes];
    store(lane, distance(DiverseMetric::kCosine, dot, splat(image_.squares[i]), splat(image_.squares[j])));
    if (lane[0] < *nearest) *nearest = lane[0];
    return true;
  }

  const DiverseTask& t_;
  const Image& image_;
  const float off_;
  int64_t left_, padded_, done_ = 0;  // left_: exact products
  ExactRow<T> row_;
};

}  // namespace filter
}  // namespace

TS_ISA_END
