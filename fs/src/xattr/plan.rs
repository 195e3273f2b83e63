//! What a change makes of an inode's two attribute areas: pure, on bytes.

use crate::format::xattr::{
    Area, Item, Items, NameIndex, Place, Value, XattrError, encode_block, encode_ibody, fits,
};
use crate::xattr::XattrMode;

/// What becomes of the attribute block.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum BlockPlan {
    /// It stays as it is, or there is none.
    Keep,
    /// It has no attributes any more.
    Drop,
    /// Its new content.
    Replace(Vec<u8>),
}

/// What becomes of both areas.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Plan {
    /// New content of the inode's area; `None`: it stays.
    pub ibody: Option<Vec<u8>>,
    /// The block.
    pub block: BlockPlan,
}

/// Why there is no plan.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum PlanError {
    /// [`XattrMode::Create`], and the attribute is there.
    Exists,
    /// [`XattrMode::Replace`] or removal, and it is not there.
    NoData,
    /// It fits neither the inode nor a block.
    NoSpace,
    /// The inode's attributes are damaged.
    Ibody(XattrError),
    /// The block is damaged.
    Block(XattrError),
}

/// The areas of an inode as they are.
pub(super) struct Areas<'a> {
    /// The inode's area; empty if it cannot hold attributes.
    pub ibody: &'a [u8],
    /// The attribute block.
    pub block: Option<&'a [u8]>,
    /// Bytes of a block.
    pub block_size: usize,
}

impl Areas<'_> {
    /// Plans to set `name` to `value`, or to remove it (`None`).
    ///
    /// Both areas are written packed, so they fit whatever fits at all. As in the kernel the
    /// inode comes first; the value leaves the one place when it goes to the other.
    pub fn set(
        &self,
        (index, name): (NameIndex, &[u8]),
        value: Option<&[u8]>,
        mode: XattrMode,
    ) -> Result<Plan, PlanError> {
        let mut inner: Items<'_> = match Area::ibody(self.ibody) {
            Ok(area) => area.map(|a| a.items().collect()).unwrap_or_default(),
            Err(e) => return Err(PlanError::Ibody(e)),
        };
        let mut outer: Items<'_> = match self.block.map(Area::block).transpose() {
            Ok(area) => area.map(|a| a.items().collect()).unwrap_or_default(),
            Err(e) => return Err(PlanError::Block(e)),
        };
        let at_inner = inner.iter().position(|i| i.is(index, name));
        let at_outer = outer.iter().position(|i| i.is(index, name));
        match (at_inner.or(at_outer), mode) {
            (Some(_), XattrMode::Create) => return Err(PlanError::Exists),
            (None, XattrMode::Replace) => return Err(PlanError::NoData),
            (None, _) if value.is_none() => return Err(PlanError::NoData),
            _ => {}
        }
        let outer_before = outer.len();
        if let Some(at) = at_outer {
            outer.remove(at);
        }
        let mut inner_changed = at_inner.is_some();
        let mut outer_changed = at_outer.is_some();
        let Some(value) = value else {
            if let Some(at) = at_inner {
                inner.remove(at);
            }
            return Ok(self.plan(inner_changed, &inner, outer_changed, outer, outer_before));
        };
        let item = Item {
            index,
            name,
            value: Value::Here(value),
        };
        match at_inner {
            Some(at) => inner[at] = item,
            None => inner.push(item),
        }
        if fits(&inner, Place::Ibody, self.ibody.len()) {
            inner_changed = true;
        } else {
            match at_inner {
                Some(at) => drop(inner.remove(at)),
                None => drop(inner.pop()),
            }
            outer.push(item);
            outer_changed = true;
            if !fits(&outer, Place::Block, self.block_size) {
                return Err(PlanError::NoSpace);
            }
        }
        Ok(self.plan(inner_changed, &inner, outer_changed, outer, outer_before))
    }

    fn plan(
        &self,
        inner_changed: bool,
        inner: &[Item<'_>],
        outer_changed: bool,
        mut outer: Items<'_>,
        outer_before: usize,
    ) -> Plan {
        let ibody = inner_changed.then(|| {
            let mut image = vec![0; self.ibody.len()];
            encode_ibody(&mut image, inner);
            image
        });
        let block = if !outer_changed {
            BlockPlan::Keep
        } else if outer.is_empty() && outer_before > 0 {
            BlockPlan::Drop
        } else {
            let mut image = vec![0; self.block_size];
            encode_block(&mut image, &mut outer);
            BlockPlan::Replace(image)
        };
        Plan { ibody, block }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    type Model = BTreeMap<Vec<u8>, Vec<u8>>;

    struct State {
        ibody: Vec<u8>,
        block: Option<Vec<u8>>,
    }

    impl State {
        fn set(
            &mut self,
            name: &[u8],
            value: Option<&[u8]>,
            mode: XattrMode,
        ) -> Result<(), PlanError> {
            let areas = Areas {
                ibody: &self.ibody,
                block: self.block.as_deref(),
                block_size: 1024,
            };
            let plan = areas.set((NameIndex::USER, name), value, mode)?;
            if let Some(ibody) = plan.ibody {
                self.ibody = ibody;
            }
            match plan.block {
                BlockPlan::Keep => {}
                BlockPlan::Drop => assert!(self.block.take().is_some()),
                BlockPlan::Replace(image) => self.block = Some(image),
            }
            Ok(())
        }

        fn all(&self) -> Model {
            let inner = Area::ibody(&self.ibody).unwrap();
            let outer = self.block.as_deref().map(|b| Area::block(b).unwrap());
            let mut model = Model::new();
            for item in [inner, outer].iter().flatten().flat_map(Area::items) {
                let Value::Here(value) = item.value else {
                    panic!()
                };
                let before = model.insert(item.name.to_vec(), value.to_vec());
                assert!(before.is_none(), "an attribute is in one place only");
            }
            model
        }
    }

    proptest! {
        #[test]
        fn attributes_are_a_map(
            ibody_len in prop_oneof![Just(0_usize), Just(96), Just(100), Just(352)],
            ops in prop::collection::vec((0..12_usize, 0..3_u8, prop::option::of(0..400_usize)), 1..80),
        ) {
            let mut state = State { ibody: vec![0; ibody_len], block: None };
            let mut model = Model::new();
            for (i, (n, mode, len)) in ops.into_iter().enumerate() {
                let name = "n".repeat(n * n + 1).into_bytes();
                let value = len.map(|len| vec![i as u8; len]);
                let mode = [XattrMode::Any, XattrMode::Create, XattrMode::Replace][mode as usize];
                let there = model.contains_key(&name);
                match state.set(&name, value.as_deref(), mode) {
                    Ok(()) => {
                        prop_assert!(!there || mode != XattrMode::Create);
                        prop_assert!(there || mode != XattrMode::Replace);
                        match value {
                            Some(value) => drop(model.insert(name, value)),
                            None => prop_assert!(model.remove(&name).is_some()),
                        }
                    }
                    Err(PlanError::Exists) => prop_assert!(there && mode == XattrMode::Create),
                    Err(PlanError::NoData) => prop_assert!(!there),
                    Err(PlanError::NoSpace) => prop_assert!(value.is_some()),
                    Err(e) => prop_assert!(false, "{e:?}"),
                }
                prop_assert_eq!(&state.all(), &model);
            }
            for name in model.keys() {
                state.set(name, None, XattrMode::Replace).unwrap();
            }
            prop_assert!(state.block.is_none());
            prop_assert!(state.ibody.iter().all(|&b| b == 0));
        }
    }
}
