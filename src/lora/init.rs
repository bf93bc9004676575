//! The tensors that training starts from.
//!
//! ```text
//! true          A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0         Kaiming-uniform with a = sqrt(5); n elements in a row
//! false         A as above, B ~ U(-1/sqrt(r), 1/sqrt(r))
//! gaussian      A ~ N(0, 1/r), B = 0
//! orthogonal    A^T = X Q_odd / 10, B = Y Q_even / 10       Q [r, r] orthogonal, X and Y ~ N(0, 1), so B A = 0
//! pissa         scaling B A = the first r singular triplets of W, shared evenly: A = sqrt(S / scaling) V^T
//! pissa_niter_N the same, found by N iterations
//! olora         A = R[:r], B = Q[:, :r] of W = Q R
//! magnitude     || W + scaling B A ||_row                   DoRA
//! ```
//! The last two take their part out of the base, W' = W - scaling B A, so that the model computes what it did before.
//! Everything random is a function of seed and names alone. The iterations' start does not even depend on the seed, so
//! that loading a folder finds the W' that the adapter was trained on.
//!
//! Source: PEFT 0.21, `tuners/lora/layer.py`; Meng, Wang, Zhang, "PiSSA", NeurIPS 2024; Büyükakyüz, "OLoRA",
//! arXiv 2406.01775.

#[cfg(feature = "decompositions")]
use super::linalg::{matrix, qr, range_svd, svd, tensor, Svd};
use super::InitLoraWeights;
use crate::philox::{philox4x32, stream_of};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, D};
#[cfg(feature = "decompositions")]
use nalgebra::DMatrix;

/// A layer to be given an adapter.
pub(super) struct Layer<'a> {
    /// Its path, and that of A in the model, which random numbers come from.
    pub(super) path: &'a str,
    pub(super) name: &'a str,
    pub(super) weight: &'a Tensor,
    pub(super) rank: usize,
    pub(super) scaling: f64,
}

/// A and B, and the weight in the base's place where it changes.
pub(super) struct Initial {
    pub(super) a: Tensor,
    pub(super) b: Tensor,
    pub(super) weight: Option<Tensor>,
}

impl InitLoraWeights {
    /// Whether the base's weights are changed, so that an adapter needs the same change when it is loaded.
    pub(super) fn changes_base(&self) -> bool {
        matches!(self, Self::Named(name) if name == "olora" || pissa_iterations(name).is_some())
    }
}

/// None: no kind of PiSSA; `Some(None)`: by a whole decomposition.
pub(super) fn pissa_iterations(name: &str) -> Option<Option<usize>> {
    match name.strip_prefix("pissa")? {
        "" => Some(None),
        rest => Some(Some(rest.strip_prefix("_niter_")?.parse().ok()?)),
    }
}

/// The start of `init` for one layer.
pub(super) fn initial(init: &InitLoraWeights, layer: &Layer<'_>, seed: u64) -> Result<Initial> {
    let name = match init {
        InitLoraWeights::Default(given) => return layer.uniform(!given, seed),
        InitLoraWeights::Named(name) => name.as_str(),
    };
    if name == "gaussian" {
        return layer.gaussian(seed);
    }
    if layer.weight.rank() != 2 {
        return Err(Error::config(format!(
            "{}: a convolution cannot be initialised by {name:?}: choose true, false or \"gaussian\"",
            layer.path
        )));
    }
    match (name, pissa_iterations(name)) {
        #[cfg(feature = "decompositions")]
        ("orthogonal", _) => layer.orthogonal(seed),
        #[cfg(feature = "decompositions")]
        ("olora", _) => layer.olora(),
        #[cfg(feature = "decompositions")]
        (_, Some(iterations)) => layer.pissa(iterations),
        #[cfg(not(feature = "decompositions"))]
        ("orthogonal" | "olora", _) | (_, Some(_)) => Err(Error::config(format!(
            "{}: init_lora_weights {name:?} needs the feature `decompositions` of candle-sam-lora",
            layer.path
        ))),
        _ => Err(Error::config(format!(
            "init_lora_weights {name:?} needs data or is not known: a new adapter can have true, false, \
             \"gaussian\", \"orthogonal\", \"pissa\", \"pissa_niter_<number>\" or \"olora\""
        ))),
    }
}

/// `|| W + scaling B A ||_row` in the shape that the magnitude has.
pub(super) fn magnitude(layer: &Layer<'_>, initial: &Initial, shape: &[usize]) -> Result<Tensor> {
    let weight = initial.weight.as_ref().unwrap_or(layer.weight).detach();
    let rows = weight.to_dtype(DType::F32)?.flatten_from(1)?;
    let (a, b) = (initial.a.flatten_from(1)?, initial.b.reshape(((), layer.rank))?);
    let sum = (rows + (b.matmul(&a)? * layer.scaling)?)?;
    Ok(sum.sqr()?.sum(D::Minus1)?.sqrt()?.reshape(shape)?)
}

impl Layer<'_> {
    fn device(&self) -> &Device {
        self.weight.device()
    }

    fn shapes(&self) -> (Vec<usize>, Vec<usize>) {
        adapter_shapes(self.weight.dims(), self.rank)
    }

    fn uniform(&self, random_b: bool, seed: u64) -> Result<Initial> {
        let (a, b) = self.shapes();
        let a = uniform(self.name, &a, seed, self.device())?;
        let b = match random_b {
            true => uniform(&format!("{}/B", self.name), &b, seed, self.device())?,
            false => Tensor::zeros(b, DType::F32, self.device())?,
        };
        Ok(Initial { a, b, weight: None })
    }

    fn gaussian(&self, seed: u64) -> Result<Initial> {
        let (a, b) = self.shapes();
        let count: usize = a.iter().product();
        let std = 1.0 / self.rank as f64;
        let values: Vec<f32> =
            normal(self.name, count, seed).map(|value| (value * std) as f32).collect();
        let a = Tensor::from_vec(values, a, self.device())?;
        Ok(Initial { a, b: Tensor::zeros(b, DType::F32, self.device())?, weight: None })
    }
}

/// Initialisations that need a decomposition.
#[cfg(feature = "decompositions")]
impl Layer<'_> {
    fn orthogonal(&self, seed: u64) -> Result<Initial> {
        let rank = self.rank;
        if !rank.is_multiple_of(2) {
            return Err(Error::config(format!(
                "{}: init_lora_weights \"orthogonal\" needs an even rank, got {rank}",
                self.path
            )));
        }
        let (out_dim, in_dim) = self.weight.dims2()?;
        let random = |part: &str, rows: usize, cols: usize| {
            let values = normal(&format!("{}/{part}", self.name), rows * cols, seed);
            DMatrix::from_iterator(rows, cols, values)
        };
        let (q, _) = qr(random("Q", rank, rank));
        let odd = DMatrix::from_fn(rank / 2, rank, |i, j| q[(2 * i, j)]);
        let even = DMatrix::from_fn(rank / 2, rank, |i, j| q[(2 * i + 1, j)]);
        let a = (random("X", in_dim, rank / 2) * odd).transpose() / 10.0;
        let b = random("Y", out_dim, rank / 2) * even / 10.0;
        let (a, b) = (tensor(&a, self.device())?, tensor(&b, self.device())?);
        Ok(Initial { a, b, weight: None })
    }

    fn pissa(&self, iterations: Option<usize>) -> Result<Initial> {
        let weight = self.decomposable()?;
        let Svd { u, s, vt } = match iterations {
            None => svd(&weight, self.rank),
            Some(iterations) => {
                let count = weight.ncols() * self.rank;
                let start = normal(self.name, count, 0);
                let start = DMatrix::from_iterator(weight.ncols(), self.rank, start);
                range_svd(&weight, &start, iterations)
            }
        };
        let root = |i: usize| (s[i] / self.scaling).sqrt();
        let a = DMatrix::from_fn(self.rank, weight.ncols(), |i, j| root(i) * vt[(i, j)]);
        let b = DMatrix::from_fn(weight.nrows(), self.rank, |i, j| u[(i, j)] * root(j));
        self.taken_out(weight, a, b)
    }

    fn olora(&self) -> Result<Initial> {
        let weight = self.decomposable()?;
        let (q, r) = qr(weight.clone());
        let (a, b) = (r.rows(0, self.rank).into_owned(), q.columns(0, self.rank).into_owned());
        self.taken_out(weight, a, b)
    }

    /// The weight, if it has parts enough.
    fn decomposable(&self) -> Result<DMatrix<f64>> {
        let weight = matrix(self.path, self.weight)?;
        let most = weight.nrows().min(weight.ncols());
        if self.rank > most || self.scaling <= 0.0 {
            return Err(Error::config(format!(
                "{}: taking part of a weight of shape {:?} out needs a rank of at most {most} and a positive \
                 scaling, got {} and {}",
                self.path,
                weight.shape(),
                self.rank,
                self.scaling
            )));
        }
        Ok(weight)
    }

    fn taken_out(&self, weight: DMatrix<f64>, a: DMatrix<f64>, b: DMatrix<f64>) -> Result<Initial> {
        let rest = weight - &b * &a * self.scaling;
        let rest = tensor(&rest, self.device())?.to_dtype(self.weight.dtype())?;
        let (a, b) = (tensor(&a, self.device())?, tensor(&b, self.device())?);
        Ok(Initial { a, b, weight: Some(rest) })
    }
}

/// The shapes of A and B for a weight `[out, in]` or `[out, in, k, k]`.
pub(super) fn adapter_shapes(weight: &[usize], rank: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut a, mut b) = (weight.to_vec(), vec![1; weight.len()]);
    a[0] = rank;
    (b[0], b[1]) = (weight[0], rank);
    (a, b)
}

/// Words of the stream of `name` under `seed`, without end.
fn words(name: &str, seed: u64) -> impl Iterator<Item = u32> {
    let (key, stream) = ([seed as u32, (seed >> 32) as u32], stream_of(name));
    (0u64..).flat_map(move |block| philox4x32([block as u32, (block >> 32) as u32, 0, stream], key))
}

fn unit(word: u32) -> f64 {
    (f64::from(word) + 0.5) / 2f64.powi(32)
}

/// `[rows, ..]` in f32, uniform in `(-1/sqrt(n), 1/sqrt(n))` with `n` the elements of a row.
pub(super) fn uniform(name: &str, shape: &[usize], seed: u64, device: &Device) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    let bound = 1.0 / ((count / shape[0]) as f64).sqrt();
    let values: Vec<f32> = words(name, seed)
        .take(count)
        .map(|word| ((2.0 * unit(word) - 1.0) * bound) as f32)
        .collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// Standard normal numbers, by Box and Muller.
fn normal(name: &str, count: usize, seed: u64) -> impl Iterator<Item = f64> {
    let mut words = words(name, seed);
    let pairs = std::iter::from_fn(move || Some((words.next()?, words.next()?)));
    pairs
        .flat_map(|(radius, angle)| {
            let (sin, cos) = (std::f64::consts::TAU * unit(angle)).sin_cos();
            let radius = (-2.0 * unit(radius).ln()).sqrt();
            [radius * cos, radius * sin]
        })
        .take(count)
}
