//! The concise form of `dmsetup --concise` and `dm-mod.create=`: devices on one line.
//!
//! `name,uuid,minor,flags,row[,row...][;name,...]`; flags are `ro` or `rw`. A backslash takes the
//! meaning from the comma, semicolon or backslash behind it.

use std::fmt;

/// A device of a concise line; `rows` is for [`Table::parse`](crate::Table::parse).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ConciseDevice {
    /// Its name.
    pub name: String,
    /// Its UUID, perhaps empty.
    pub uuid: String,
    /// Its minor number where one is asked for.
    pub minor: Option<u32>,
    /// Whether writes shall be refused.
    pub read_only: bool,
    /// Rows, a line each.
    pub rows: String,
}

/// Why a concise line is none. Devices count from 1.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ConciseError {
    /// Fewer fields than `name,uuid,minor,flags,row`.
    #[error("device {device}: not `name,uuid,minor,flags,row`")]
    Form {
        /// Which one.
        device: usize,
    },
    /// A device without a name.
    #[error("device {device}: no name")]
    NoName {
        /// Which one.
        device: usize,
    },
    /// A minor number that is none.
    #[error("device {device}, minor: not a number: {value:?}")]
    Minor {
        /// Which one.
        device: usize,
        /// What stands there.
        value: String,
    },
    /// Flags that are neither `ro` nor `rw`.
    #[error("device {device}, flags: not `ro` or `rw`: {value:?}")]
    Flags {
        /// Which one.
        device: usize,
        /// What stands there.
        value: String,
    },
}

/// Parses all devices of a line, in order; a later one may stand on an earlier one.
///
/// # Errors
/// What is wrong with which device.
pub fn parse(text: &str) -> Result<Vec<ConciseDevice>, ConciseError> {
    let devices = split(text);
    let count = devices.len();
    let mut parsed = Vec::with_capacity(count);
    for (at, fields) in devices.into_iter().enumerate() {
        // A semicolon may also end the line.
        if at > 0 && at + 1 == count && fields.iter().all(String::is_empty) {
            break;
        }
        parsed.push(device(at + 1, fields)?);
    }
    Ok(parsed)
}

fn device(device: usize, fields: Vec<String>) -> Result<ConciseDevice, ConciseError> {
    let mut fields = fields.into_iter().map(|field| field.trim().to_owned());
    let mut next = || fields.next().ok_or(ConciseError::Form { device });
    let (name, uuid, minor, flags) = (next()?, next()?, next()?, next()?);
    let rows: Vec<String> = fields.collect();
    if name.is_empty() {
        return Err(ConciseError::NoName { device });
    }
    if rows.is_empty() {
        return Err(ConciseError::Form { device });
    }
    let minor = match minor.parse() {
        Ok(number) => Some(number),
        Err(_) if minor.is_empty() => None,
        Err(_) => {
            return Err(ConciseError::Minor {
                device,
                value: minor,
            });
        }
    };
    let read_only = match flags.as_str() {
        "ro" => true,
        "rw" | "" => false,
        _ => {
            return Err(ConciseError::Flags {
                device,
                value: flags,
            });
        }
    };
    Ok(ConciseDevice {
        name,
        uuid,
        minor,
        read_only,
        rows: rows.join("\n") + "\n",
    })
}

/// Fields of each device, unescaped.
fn split(text: &str) -> Vec<Vec<String>> {
    let mut devices = vec![vec![String::new()]];
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        let literal = match char {
            ';' => {
                devices.push(vec![String::new()]);
                continue;
            }
            ',' => {
                if let Some(fields) = devices.last_mut() {
                    fields.push(String::new());
                }
                continue;
            }
            '\\' => chars.next().unwrap_or('\\'),
            other => other,
        };
        if let Some(field) = devices.last_mut().and_then(|fields| fields.last_mut()) {
            field.push(literal);
        }
    }
    devices
}

impl fmt::Display for ConciseDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escaped = |text: &str| {
            let special = |char: char| [',', ';', '\\'].contains(&char);
            let mut out = String::with_capacity(text.len());
            for char in text.chars() {
                if special(char) {
                    out.push('\\');
                }
                out.push(char);
            }
            out
        };
        write!(f, "{},{},", escaped(&self.name), escaped(&self.uuid))?;
        if let Some(minor) = self.minor {
            write!(f, "{minor}")?;
        }
        f.write_str(if self.read_only { ",ro" } else { ",rw" })?;
        for row in self.rows.lines() {
            write!(f, ",{}", escaped(row))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{ConciseError, parse};

    #[test]
    fn devices_and_rows_are_told_apart() {
        let text = "a,,,ro,0 8 zero,8 8 linear x\\,y 0;b,u-1,3,rw,0 16 linear a 0;";
        let devices = parse(text).unwrap();
        assert_eq!(devices.len(), 2);
        assert_eq!(devices[0].rows, "0 8 zero\n8 8 linear x,y 0\n");
        assert!(devices[0].read_only && !devices[1].read_only);
        assert_eq!(
            (devices[1].uuid.as_str(), devices[1].minor),
            ("u-1", Some(3))
        );
        let printed: Vec<String> = devices.iter().map(ToString::to_string).collect();
        assert_eq!(format!("{};", printed.join(";")), text);
    }

    #[test]
    fn errors_name_the_device() {
        assert_eq!(parse(""), Err(ConciseError::Form { device: 1 }));
        assert_eq!(parse("a,,,rw"), Err(ConciseError::Form { device: 1 }));
        assert_eq!(
            parse("a,,,rw,0 8 zero;,,,rw,0 8 zero"),
            Err(ConciseError::NoName { device: 2 })
        );
        assert!(matches!(
            parse("a,,x,rw,0 8 zero"),
            Err(ConciseError::Minor { .. })
        ));
        assert!(matches!(
            parse("a,,,wo,0 8 zero"),
            Err(ConciseError::Flags { .. })
        ));
    }
}
