//! Which targets a table may name.

use std::collections::BTreeMap;

use crate::args::{Args, CtrError};
use crate::row::{Row, construct};
use crate::target::{TableCx, Target};

type Construct = fn(&mut Args<'_>, &TableCx<'_>) -> Result<Box<dyn Row>, CtrError>;

/// Targets by name.
#[derive(Clone, Default)]
pub struct Registry {
    by_name: BTreeMap<&'static str, Construct>,
}

impl Registry {
    /// No targets.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// All targets of this crate.
    #[must_use]
    pub fn standard() -> Self {
        let mut registry = Self::empty();
        registry.register::<crate::linear::Linear>();
        registry.register::<crate::delay::Delay>();
        registry.register::<crate::striped::Striped>();
        registry.register::<crate::unstriped::Unstriped>();
        registry.register::<crate::zero::Zero>();
        registry.register::<crate::error::Error>();
        registry
    }

    /// Adds a target, in place of one of the same name.
    pub fn register<T: Target>(&mut self) {
        self.by_name.insert(T::NAME, construct::<T>);
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.by_name.keys().copied()
    }

    pub(crate) fn find(&self, name: &str) -> Option<Construct> {
        self.by_name.get(name).copied()
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}
