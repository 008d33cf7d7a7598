// Functions of vectors: selection, exp, log, tanh, logistic and normal distribution.

#pragma once

#include "vec.h"

namespace octavo {

// Per lane: a < b ? x : y. A NaN in a or b gives y.
OCTAVO_INLINE vf vselect_less(vf a, vf b, vf x, vf y) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
#elif defined(__AVX2__)
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
#else
  vf r = {};
  for (int i = 0; i < W; ++i) r[i] = a[i] < b[i] ? x[i] : y[i];
  return r;
#endif
}

// exp(x) for x <= 88, at most 2 units in the last place off. Below -87.3 it is 0 (no subnormals), exp(0) is 1 exactly,
// and exp(NaN) is NaN. Cody-Waite reduction by ln 2 and a polynomial of degree 6 on [-ln2/2, ln2/2].
OCTAVO_INLINE vf vexp(vf x) {
  const vf lowest = vset(-87.33654f);
  const vf bounded = vmax(lowest, x);
  const vf n = vround(vmul(bounded, vset(1.44269504088896341f)));
  vf r = vfnma(n, vset(0.693359375f), bounded);
  r = vfnma(n, vset(-2.12194440e-4f), r);
  vf p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vadd(vfma(vmul(r, r), p, r), vset(1.0f));
  return vselect_less(x, lowest, vzero(), vmul(p, vpow2(n)));
}

// log(2^e * (1 + f)) for whole numbers e in -126 .. 127 and f in [sqrt(1/2) - 1, sqrt(2) - 1], a unit in the last place
// off, near 0 too where f is exact. A polynomial of degree 7 for what follows f - f^2 / 2. There are no fused products
// in it, so that all instruction sets give the same bits.
OCTAVO_INLINE vf vlog_of_parts(vf e, vf f) {
  constexpr float kSeries[] = {1.276157796e-1f,  -1.316018254e-1f, 1.420175731e-1f, -1.662335694e-1f,
                               2.000122666e-1f, -2.500081956e-1f, 3.333333135e-1f};
  vf p = vset(-7.634499669e-2f);
  for (const float term : kSeries) p = vadd(vmul(p, f), vset(term));
  const vf square = vmul(f, f);
  vf rest = vmul(vmul(f, square), p);
  rest = vadd(rest, vmul(e, vset(-2.12194440e-4f)));  // ln 2 in two parts, the first of few bits
  rest = vsub(rest, vmul(vset(0.5f), square));
  return vadd(vadd(f, rest), vmul(e, vset(0.693359375f)));
}

// 1 / (1 + exp(-x)), and 0 for x below -87.3: exp is taken of -|x| alone, so that nothing overflows.
OCTAVO_INLINE vf vlogistic(vf x) {
  const vf e = vexp(vsub(vzero(), vabs(x)));
  const vf whole = vdiv(vset(1.0f), vadd(vset(1.0f), e));
  return vselect_less(x, vzero(), vmul(e, whole), whole);
}

// tanh(x): a polynomial in x^2 near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
OCTAVO_INLINE vf vtanh(vf x) {
  const vf size = vabs(x);
  const vf square = vmul(x, x);
  vf p = vset(-5.668607075e-3f);
  p = vfma(p, square, vset(2.059904486e-2f));
  p = vfma(p, square, vset(-5.372370034e-2f));
  p = vfma(p, square, vset(1.333116293e-1f));
  p = vfma(p, square, vset(-3.333326280e-1f));
  const vf small = vfma(vmul(p, square), x, x);
  const vf e = vexp(vmul(vset(-2.0f), size));
  const vf large = vdiv(vsub(vset(1.0f), e), vadd(vset(1.0f), e));
  return vselect_less(size, vset(0.625f), small, vselect_less(x, vzero(), vsub(vzero(), large), large));
}

// The normal distribution function, 0.5 * (1 + erf(x / sqrt(2))), with small relative error for negative x too:
// erf by a polynomial in x^2 where |x / sqrt(2)| < 1, else erfc as exp(-x^2 / 2) times a polynomial in 1 / (1 + 0.4 |x|).
OCTAVO_INLINE vf vnormal_cdf(vf x) {
  const vf z = vmul(x, vset(0.70710678f));
  const vf square = vmul(z, z);
  vf p = vset(-9.6735911939e-6f);
  p = vfma(p, square, vset(1.1268253729e-4f));
  p = vfma(p, square, vset(-8.4843963850e-4f));
  p = vfma(p, square, vset(5.2210534923e-3f));
  p = vfma(p, square, vset(-2.6865437627e-2f));
  p = vfma(p, square, vset(1.1283782870e-1f));
  p = vfma(p, square, vset(-3.7612637877e-1f));
  p = vfma(p, square, vset(1.1283792257f));
  const vf near = vmul(vset(0.5f), vfma(p, z, vset(1.0f)));

  const vf size = vabs(z);
  const vf u = vdiv(vset(1.0f), vfma(vset(0.4f), size, vset(1.0f)));
  vf t = vset(-1.176092997e-1f);
  t = vfma(t, u, vset(2.472546399e-1f));
  t = vfma(t, u, vset(4.263616633e-3f));
  t = vfma(t, u, vset(2.153180540e-1f));
  t = vfma(t, u, vset(1.980818212e-1f));
  t = vfma(t, u, vset(2.268042415e-1f));
  t = vfma(t, u, vset(2.256198525e-1f));
  const vf tail = vmul(vset(0.5f), vmul(vmul(t, u), vexp(vsub(vzero(), square))));
  const vf far = vselect_less(x, vzero(), tail, vsub(vset(1.0f), tail));
  return vselect_less(size, vset(1.0f), near, far);
}

}  // namespace octavo
