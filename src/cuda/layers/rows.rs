//! The rows of several tensors, as kernels that know three dimensions of them see them.

use candle_core::{Result, Tensor};

/// The strides of a tensor's rows along dimensions that it shares with others.
pub(super) type Strides = Vec<usize>;

/// Tensors with the same number of rows of `width` elements, which lie next to each other in each row.
pub(super) struct SharedRows {
    /// B, T and H.
    pub sizes: [usize; 3],
    /// As given, or contiguous copies of those whose rows do not lie evenly.
    pub tensors: Vec<Tensor>,
    /// Of each tensor: elements from one row to the next along B, T and H.
    strides: Vec<[usize; 3]>,
    width: usize,
}

impl SharedRows {
    /// The first tensor says what the rows' dimensions are; the others may have the last two as one.
    pub fn new(tensors: &[&Tensor], width: usize) -> Result<Self> {
        let dims = tensors.first().map_or(&[][..], |x| x.dims());
        let outer = &dims[..dims.len().saturating_sub(1)];
        let mut kept = Vec::new();
        let mut strides = Vec::new();
        for x in tensors {
            let own = strides_of_rows(x, outer, width);
            kept.push(if own.is_some() { (*x).clone() } else { x.contiguous()? });
            strides.push(own.unwrap_or_else(|| contiguous_strides(outer, width)));
        }
        let (sizes, strides) = match merged(outer, &strides) {
            Some(merged) => merged,
            None => {
                kept = kept.iter().map(Tensor::contiguous).collect::<Result<_>>()?;
                let rows = outer.iter().product();
                ([1, rows, 1], vec![[rows * width, width, width]; tensors.len()])
            }
        };
        Ok(Self { sizes, tensors: kept, strides, width })
    }

    pub fn rows(&self) -> usize {
        self.sizes.iter().product()
    }

    /// The strides of tensor `index` along B, T, H and the row.
    pub fn strides(&self, index: usize) -> [usize; 4] {
        let [batch, token, head] = self.strides[index];
        [batch, token, head, 1]
    }

    /// Those of a contiguous tensor with such rows.
    pub fn contiguous(&self) -> [usize; 4] {
        let [_, tokens, heads] = self.sizes;
        [tokens * heads * self.width, heads * self.width, self.width, 1]
    }
}

fn contiguous_strides(outer: &[usize], width: usize) -> Strides {
    let mut strides = vec![0; outer.len()];
    let mut stride = width;
    for (at, size) in strides.iter_mut().zip(outer).rev() {
        *at = stride;
        stride *= size;
    }
    strides
}

/// From row to row along the dimensions `outer`; none if the elements of a row are not neighbours, or rows lie unevenly.
fn strides_of_rows(x: &Tensor, outer: &[usize], width: usize) -> Option<Strides> {
    if x.is_contiguous() {
        return Some(contiguous_strides(outer, width));
    }
    let (dims, strides) = (x.dims(), x.stride());
    let ((last, before), (stride, of_rows)) = (dims.split_last()?, strides.split_last()?);
    if *stride != 1 && *last > 1 {
        return None;
    }
    if before == outer && *last == width {
        return Some(of_rows.to_vec());
    }
    // Heads side by side in one dimension.
    let (heads, tokens) = outer.split_last()?;
    let side_by_side = before == tokens && *last == heads * width;
    side_by_side.then(|| of_rows.iter().copied().chain([width]).collect())
}

/// The same rows along three dimensions, if neighbouring dimensions can be made one for every tensor until there are no more.
fn merged(outer: &[usize], strides: &[Strides]) -> Option<([usize; 3], Vec<[usize; 3]>)> {
    let mut dims: Vec<(usize, Vec<usize>)> = Vec::new();
    for (i, &size) in outer.iter().enumerate().filter(|(_, size)| **size != 1) {
        let own: Vec<usize> = strides.iter().map(|s| s[i]).collect();
        match dims.last_mut() {
            Some((sizes, before)) if before.iter().zip(&own).all(|(b, own)| *b == own * size) => {
                (*sizes, *before) = (*sizes * size, own);
            }
            _ => dims.push((size, own)),
        }
    }
    let nothing = || (1, vec![0; strides.len()]);
    // One dimension is tokens, two are tokens and heads.
    if dims.len() == 1 {
        dims.push(nothing());
    }
    while dims.len() < 3 {
        dims.insert(0, nothing());
    }
    let [b, t, h] = <[_; 3]>::try_from(dims).ok()?;
    let of_each = (0..strides.len()).map(|i| [b.1[i], t.1[i], h.1[i]]).collect();
    Some(([b.0, t.0, h.0], of_each))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    fn zeros(dims: &[usize]) -> Tensor {
        Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn contiguous_rows_are_one_dimension() {
        let (x, gate) = (zeros(&[2, 3, 4, 5]), zeros(&[2, 3, 20]));
        let rows = SharedRows::new(&[&x, &gate], 5).unwrap();
        assert_eq!(rows.sizes, [1, 24, 1]);
        assert_eq!([0, 1].map(|i| rows.strides(i)[1]), [5, 5]);
    }

    #[test]
    fn windows_are_not_copied() {
        let x = zeros(&[2, 3, 9, 5]).narrow(2, 1, 4).unwrap();
        let gate = zeros(&[2, 3, 50]).narrow(2, 7, 20).unwrap();
        let rows = SharedRows::new(&[&x, &gate], 5).unwrap();
        assert_eq!(rows.sizes, [1, 6, 4]);
        assert_eq!(rows.strides(0), [0, 45, 5, 1]);
        assert_eq!(rows.strides(1), [0, 50, 5, 1]);
        assert!(rows.tensors.iter().all(|x| !x.is_contiguous()));
    }

    #[test]
    fn what_lies_unevenly_is_copied() {
        let x = zeros(&[2, 3, 4, 5]);
        for other in
            [x.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap(), zeros(&[120])]
        {
            let rows = SharedRows::new(&[&x, &other], 5).unwrap();
            assert!(rows.tensors[1].is_contiguous());
            assert_eq!(rows.sizes, [1, 24, 1]);
        }
        let many = zeros(&[3, 3, 3, 3, 5]).narrow(0, 0, 2).unwrap().narrow(1, 0, 2).unwrap();
        let many = many.narrow(2, 0, 2).unwrap().narrow(3, 0, 2).unwrap();
        let rows = SharedRows::new(&[&many], 5).unwrap();
        assert!(rows.tensors[0].is_contiguous());
        assert_eq!((rows.sizes, rows.strides(0)), ([1, 16, 1], [80, 5, 5, 1]));
    }

    #[test]
    fn no_rows_and_one() {
        for dims in [&[0, 5][..], &[2, 0, 3, 5], &[5], &[1, 1, 5]] {
            let rows = SharedRows::new(&[&zeros(dims)], 5).unwrap();
            assert_eq!(rows.rows(), dims[..dims.len() - 1].iter().product::<usize>(), "{dims:?}");
        }
    }
}
