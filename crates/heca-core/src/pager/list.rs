//! Doubly linked lists of pages that share one table of links: a page is in one list at the most,
//! and every operation is O(1) and allocates nothing.

const NIL: u32 = u32::MAX;

/// Link table of all pages.
#[derive(Debug, Clone)]
pub(super) struct Links(Vec<(u32, u32)>);

impl Links {
    pub(super) fn new(pages: u64) -> Self {
        Self(vec![(NIL, NIL); pages as usize])
    }
}

/// One list, oldest page first.
#[derive(Debug, Clone)]
pub(super) struct List {
    head: u32,
    tail: u32,
    len: u64,
}

impl List {
    pub(super) const fn new() -> Self {
        Self { head: NIL, tail: NIL, len: 0 }
    }

    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn push(&mut self, links: &mut Links, page: u64) {
        let page = page as u32;
        debug_assert_eq!(links.0[page as usize], (NIL, NIL));
        links.0[page as usize] = (self.tail, NIL);
        if self.tail == NIL {
            self.head = page;
        } else {
            links.0[self.tail as usize].1 = page;
        }
        self.tail = page;
        self.len += 1;
    }

    pub(super) fn pop(&mut self, links: &mut Links) -> Option<u64> {
        let page = self.head;
        (page != NIL).then(|| {
            self.remove(links, u64::from(page));
            u64::from(page)
        })
    }

    /// Takes out a page, which must be in this list.
    pub(super) fn remove(&mut self, links: &mut Links, page: u64) {
        let (prev, next) = std::mem::replace(&mut links.0[page as usize], (NIL, NIL));
        match prev {
            NIL => {
                debug_assert_eq!(u64::from(self.head), page);
                self.head = next;
            }
            prev => links.0[prev as usize].1 = next,
        }
        match next {
            NIL => self.tail = prev,
            next => links.0[next as usize].0 = prev,
        }
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_leave_in_the_order_they_came_unless_taken_out() {
        let mut links = Links::new(8);
        let mut list = List::new();
        for page in [3, 1, 7, 5] {
            list.push(&mut links, page);
        }
        list.remove(&mut links, 1);
        list.remove(&mut links, 5);
        list.push(&mut links, 1);
        let order: Vec<_> = std::iter::from_fn(|| list.pop(&mut links)).collect();
        assert_eq!(order, [3, 7, 1]);
        assert_eq!(list.len(), 0);
    }
}
