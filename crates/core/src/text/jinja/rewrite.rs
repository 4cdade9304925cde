//! The syntax tree with filters in place of operators and literals.

use minijinja::{
    Error, ErrorKind, Value,
    machinery::{
        Span,
        ast::{self, BinOpKind, CallArg, CompareOpKind, Expr, Spanned, Stmt, UnaryOpKind},
    },
};

use super::{
    Result, fail,
    operators::{
        ATTRIBUTE, COMPARE, DICT, ITEM, LIST, LOOP, LOOP_UNPACKED, NEGATE, SET, SLICE, SPLAT, SPLAT_NAMED,
        TEXT_CONCAT, TUPLE, UNPACK,
    },
};

/// Scopes that a block is wrapped into.
const SCOPES_OF_BLOCK: usize = 4;

fn statements<'a>(body: &[Stmt<'a>]) -> Result<Vec<Stmt<'a>>> {
    let mut result = Vec::with_capacity(body.len());
    for stmt in body {
        match stmt {
            // An attribute is set by a filter without output.
            Stmt::Set(set) if has_attribute(&set.target) => {
                let span = set.span();
                let mut assigned = Vec::new();
                let target = without_attributes(&set.target, &mut assigned)?;
                let value = assigned_value(&set.target, &set.expr)?;
                match (target, assigned.as_slice()) {
                    (None, [(object, name, _)]) => {
                        result.push(emit(span, set_attribute(span, copy(object), name, value)));
                    }
                    (target, _) => {
                        let target = target.unwrap_or_else(|| variable(span, TEMPORARY[0]));
                        result.push(Stmt::Set(Spanned::new(ast::Set { target, expr: value }, span)));
                        for (object, name, temporary) in assigned {
                            let value = variable(span, temporary);
                            result.push(emit(span, set_attribute(span, copy(&object), name, value)));
                        }
                    }
                }
            }
            Stmt::SetBlock(set) if has_attribute(&set.target) => {
                let span = set.span();
                let mut assigned = Vec::new();
                without_attributes(&set.target, &mut assigned)?;
                let block = ast::SetBlock {
                    target: variable(span, TEMPORARY[0]),
                    filter: set.filter.as_ref().map(expression).transpose()?,
                    body: statements(&set.body)?,
                };
                result.push(Stmt::SetBlock(Spanned::new(block, span)));
                for (object, name, _) in assigned {
                    let value = variable(span, TEMPORARY[0]);
                    result.push(emit(span, set_attribute(span, object, name, value)));
                }
            }
            other => result.push(statement(other)?),
        }
    }
    Ok(result)
}

/// Variables for values that are about to become attributes. No template can name them.
const TEMPORARY: [&str; 8] = ["= 0", "= 1", "= 2", "= 3", "= 4", "= 5", "= 6", "= 7"];

fn has_attribute(target: &Expr<'_>) -> bool {
    match target {
        Expr::GetAttr(_) => true,
        Expr::List(list) => list.items.iter().any(has_attribute),
        _ => false,
    }
}

type Assigned<'a> = Vec<(Expr<'a>, &'a str, &'a str)>;

/// The target with variables in place of attributes, unless it is an attribute itself.
fn without_attributes<'a>(target: &Expr<'a>, assigned: &mut Assigned<'a>) -> Result<Option<Expr<'a>>> {
    Ok(match target {
        Expr::GetAttr(attribute) => {
            let temporary =
                TEMPORARY.get(assigned.len()).ok_or_else(|| fail("too many attributes in `set`"))?;
            assigned.push((expression(&attribute.expr)?, attribute.name, temporary));
            None
        }
        Expr::List(list) => {
            let mut items = Vec::with_capacity(list.items.len());
            for item in &list.items {
                let place = without_attributes(item, assigned)?;
                items.push(match place {
                    Some(place) => place,
                    None => variable(list.span(), assigned.last().map_or(TEMPORARY[0], |(.., name)| name)),
                });
            }
            Some(Expr::List(Spanned::new(ast::List { items }, list.span())))
        }
        other => Some(copy(other)),
    })
}

/// A copy of a variable, or of a target that has only variables.
fn copy<'a>(expr: &Expr<'a>) -> Expr<'a> {
    match expr {
        Expr::List(list) => {
            let items = list.items.iter().map(copy).collect();
            Expr::List(Spanned::new(ast::List { items }, list.span()))
        }
        Expr::Filter(filter) => {
            let args = filter.args.iter().filter_map(|arg| match arg {
                CallArg::Pos(expr) => Some(CallArg::Pos(copy(expr))),
                _ => None,
            });
            let copied =
                ast::Filter { name: filter.name, expr: filter.expr.as_ref().map(copy), args: args.collect() };
            Expr::Filter(Spanned::new(copied, filter.span()))
        }
        Expr::Const(value) => constant(value.span(), value.value.clone()),
        Expr::Var(var) => variable(var.span(), var.id),
        other => constant(other.span(), Value::UNDEFINED),
    }
}

fn emit(span: Span, expr: Expr<'_>) -> Stmt<'_> {
    Stmt::EmitExpr(Spanned::new(ast::EmitExpr { expr }, span))
}

fn set_attribute<'a>(span: Span, object: Expr<'a>, name: &str, value: Expr<'a>) -> Expr<'a> {
    filter(span, SET, object, [constant(span, name.into()), value])
}

fn assigned_value<'a>(target: &Expr<'a>, value: &Expr<'a>) -> Result<Expr<'a>> {
    let value = expression(value)?;
    Ok(if matches!(target, Expr::List(_)) { filter(value.span(), UNPACK, value, []) } else { value })
}

#[allow(clippy::too_many_lines, reason = "one short arm for each kind of statement")]
pub(super) fn statement<'a>(stmt: &Stmt<'a>) -> Result<Stmt<'a>> {
    Ok(match stmt {
        Stmt::Template(node) => {
            let children = statements(&node.children)?;
            Stmt::Template(Spanned::new(ast::Template { children }, node.span()))
        }
        Stmt::EmitExpr(node) => emit(node.span(), expression(&node.expr)?),
        Stmt::EmitRaw(node) => Stmt::EmitRaw(Spanned::new(ast::EmitRaw { raw: node.raw }, node.span())),
        Stmt::ForLoop(node) => {
            let unpacks = matches!(node.target, Expr::List(_));
            let items = expression(&node.iter)?;
            let node_copy = ast::ForLoop {
                target: copy(&node.target),
                iter: filter(items.span(), if unpacks { LOOP_UNPACKED } else { LOOP }, items, []),
                filter_expr: node.filter_expr.as_ref().map(expression).transpose()?,
                recursive: node.recursive,
                body: statements(&node.body)?,
                else_body: statements(&node.else_body)?,
            };
            Stmt::ForLoop(Spanned::new(node_copy, node.span()))
        }
        Stmt::IfCond(node) => Stmt::IfCond(Spanned::new(
            ast::IfCond {
                expr: expression(&node.expr)?,
                true_body: statements(&node.true_body)?,
                false_body: statements(&node.false_body)?,
            },
            node.span(),
        )),
        Stmt::WithBlock(node) => {
            // All values are computed before the first variable is set.
            let span = node.span();
            let assignments = match node.assignments.as_slice() {
                [] => Vec::new(),
                [(target, value)] => vec![(copy(target), assigned_value(target, value)?)],
                several => {
                    let targets = several.iter().map(|(target, _)| copy(target)).collect();
                    let values = several.iter().map(|(target, value)| assigned_value(target, value));
                    let values = filter(span, TUPLE, nothing(span), values.collect::<Result<Vec<_>>>()?);
                    vec![(Expr::List(Spanned::new(ast::List { items: targets }, span)), values)]
                }
            };
            Stmt::WithBlock(Spanned::new(ast::WithBlock { assignments, body: statements(&node.body)? }, span))
        }
        Stmt::Set(node) => Stmt::Set(Spanned::new(
            ast::Set { target: copy(&node.target), expr: assigned_value(&node.target, &node.expr)? },
            node.span(),
        )),
        Stmt::SetBlock(node) => Stmt::SetBlock(Spanned::new(
            ast::SetBlock {
                target: copy(&node.target),
                filter: node.filter.as_ref().map(expression).transpose()?,
                body: statements(&node.body)?,
            },
            node.span(),
        )),
        Stmt::AutoEscape(node) => Stmt::AutoEscape(Spanned::new(
            ast::AutoEscape { enabled: expression(&node.enabled)?, body: statements(&node.body)? },
            node.span(),
        )),
        Stmt::FilterBlock(node) => Stmt::FilterBlock(Spanned::new(
            ast::FilterBlock {
                filter: expression(&node.filter)?,
                filter_span: node.filter_span,
                body: statements(&node.body)?,
            },
            node.span(),
        )),
        Stmt::Block(node) => {
            // A block takes as much stack as a macro but counts once for the limit of nesting. Scopes make it count more.
            let mut body = statements(&node.body)?;
            for _ in 0..SCOPES_OF_BLOCK {
                let scope = ast::WithBlock { assignments: Vec::new(), body };
                body = vec![Stmt::WithBlock(Spanned::new(scope, node.span()))];
            }
            Stmt::Block(Spanned::new(
                ast::Block { name: node.name, required: node.required, body },
                node.span(),
            ))
        }
        Stmt::Macro(node) => Stmt::Macro(macro_declaration(node)?),
        Stmt::CallBlock(node) => Stmt::CallBlock(Spanned::new(
            ast::CallBlock {
                call: call(&node.call)?,
                call_expr_span: node.call_expr_span,
                macro_decl: macro_declaration(&node.macro_decl)?,
            },
            node.span(),
        )),
        Stmt::Continue(node) => Stmt::Continue(Spanned::new(ast::Continue, node.span())),
        Stmt::Break(node) => Stmt::Break(Spanned::new(ast::Break, node.span())),
        // There is no loader, so these fail when they run.
        Stmt::Include(node) => {
            let name = expression(&node.name)?;
            Stmt::Include(Spanned::new(ast::Include { name, ignore_missing: false }, node.span()))
        }
        Stmt::Import(node) => {
            let import = ast::Import { expr: expression(&node.expr)?, name: copy(&node.name) };
            Stmt::Import(Spanned::new(import, node.span()))
        }
        Stmt::FromImport(node) => {
            let names = node.names.iter().map(|(name, alias)| (copy(name), alias.as_ref().map(copy)));
            let import = ast::FromImport { expr: expression(&node.expr)?, names: names.collect() };
            Stmt::FromImport(Spanned::new(import, node.span()))
        }
        Stmt::Extends(node) => {
            Stmt::Extends(Spanned::new(ast::Extends { name: expression(&node.name)? }, node.span()))
        }
        Stmt::Do(node) => {
            let message = format!("unknown statement do (in chat_template:{})", node.span().start_line);
            return Err(Error::new(ErrorKind::SyntaxError, message));
        }
    })
}

fn macro_declaration<'a>(node: &Spanned<ast::Macro<'a>>) -> Result<Spanned<ast::Macro<'a>>> {
    if node.defaults.iter().any(|default| !matches!(default, Expr::Const(_))) {
        return macro_with_computed_defaults(node);
    }
    let copied = ast::Macro {
        name: node.name,
        args: node.args.iter().map(copy).collect(),
        defaults: node.defaults.iter().map(expression).collect::<Result<_>>()?,
        body: statements(&node.body)?,
    };
    Ok(Spanned::new(copied, node.span()))
}

/// A default may name a parameter before it, which minijinja sets later. So the body begins with the defaults.
fn macro_with_computed_defaults<'a>(node: &Spanned<ast::Macro<'a>>) -> Result<Spanned<ast::Macro<'a>>> {
    let with_default = node.args.len().saturating_sub(node.defaults.len());
    let mut body = Vec::with_capacity(node.defaults.len() + node.body.len());
    for (parameter, default) in node.args.iter().skip(with_default).zip(&node.defaults) {
        let span = default.span();
        let is_missing = ast::Test { name: "undefined", expr: copy(parameter), args: Vec::new() };
        let set = ast::Set { target: copy(parameter), expr: expression(default)? };
        body.push(Stmt::IfCond(Spanned::new(
            ast::IfCond {
                expr: Expr::Test(Spanned::new(is_missing, span)),
                true_body: vec![Stmt::Set(Spanned::new(set, span))],
                false_body: Vec::new(),
            },
            span,
        )));
    }
    body.extend(statements(&node.body)?);
    let args = node.args.iter().map(copy).collect();
    Ok(Spanned::new(ast::Macro { name: node.name, args, defaults: Vec::new(), body }, node.span()))
}

fn variable(span: Span, id: &str) -> Expr<'_> {
    Expr::Var(Spanned::new(ast::Var { id }, span))
}

fn constant<'a>(span: Span, value: Value) -> Expr<'a> {
    Expr::Const(Spanned::new(ast::Const { value }, span))
}

/// What the filters of literals are applied to.
fn nothing<'a>(span: Span) -> Expr<'a> {
    constant(span, Value::UNDEFINED)
}

fn filter<'a>(
    span: Span,
    name: &'static str,
    expr: Expr<'a>,
    args: impl IntoIterator<Item = Expr<'a>>,
) -> Expr<'a> {
    let args = args.into_iter().map(CallArg::Pos).collect();
    Expr::Filter(Spanned::new(ast::Filter { name, expr: Some(expr), args }, span))
}

fn comparison(op: CompareOpKind) -> &'static str {
    match op {
        CompareOpKind::Eq => "==",
        CompareOpKind::Ne => "!=",
        CompareOpKind::Lt => "<",
        CompareOpKind::Lte => "<=",
        CompareOpKind::Gt => ">",
        CompareOpKind::Gte => ">=",
        CompareOpKind::In => "in",
        CompareOpKind::NotIn => "not in",
    }
}

/// An expression with filters in place of operators and literals. This also keeps minijinja from computing constants
/// while it compiles, by its own rules and without a limit.
fn expression<'a>(expr: &Expr<'a>) -> Result<Expr<'a>> {
    let span = expr.span();
    let optional = |expr: &Option<Expr<'a>>| match expr {
        Some(expr) => expression(expr),
        None => Ok(constant(span, ().into())),
    };
    Ok(match expr {
        Expr::Var(_) | Expr::Const(_) => copy(expr),
        Expr::Slice(node) => {
            let bounds = [optional(&node.start)?, optional(&node.stop)?, optional(&node.step)?];
            filter(span, SLICE, expression(&node.expr)?, bounds)
        }
        Expr::UnaryOp(node) => {
            let operand = expression(&node.expr)?;
            match node.op {
                UnaryOpKind::Neg => filter(span, NEGATE, operand, []),
                UnaryOpKind::Not => {
                    Expr::UnaryOp(Spanned::new(ast::UnaryOp { op: UnaryOpKind::Not, expr: operand }, span))
                }
            }
        }
        Expr::BinOp(node) => {
            let (left, right) = (expression(&node.left)?, expression(&node.right)?);
            let name = match node.op {
                BinOpKind::ScAnd | BinOpKind::ScOr => {
                    return Ok(Expr::BinOp(Spanned::new(ast::BinOp { op: node.op, left, right }, span)));
                }
                BinOpKind::Eq => "==",
                BinOpKind::Ne => "!=",
                BinOpKind::Lt => "<",
                BinOpKind::Lte => "<=",
                BinOpKind::Gt => ">",
                BinOpKind::Gte => ">=",
                BinOpKind::In => "<-",
                BinOpKind::Add => "+",
                BinOpKind::Sub => "-",
                BinOpKind::Mul => "*",
                BinOpKind::Div => "/",
                BinOpKind::FloorDiv => "//",
                BinOpKind::Rem => "%",
                BinOpKind::Pow => "**",
                BinOpKind::Concat => TEXT_CONCAT,
            };
            filter(span, name, left, [right])
        }
        Expr::Compare(node) => {
            let mut args = Vec::with_capacity(2 * node.ops.len());
            for op in &node.ops {
                args.push(constant(span, comparison(op.op).into()));
                args.push(expression(&op.expr)?);
            }
            filter(span, COMPARE, expression(&node.expr)?, args)
        }
        Expr::IfExpr(node) => Expr::IfExpr(Spanned::new(
            ast::IfExpr {
                test_expr: expression(&node.test_expr)?,
                true_expr: expression(&node.true_expr)?,
                false_expr: node.false_expr.as_ref().map(expression).transpose()?,
            },
            span,
        )),
        Expr::Filter(node) => {
            let expr = node.expr.as_ref().map(expression).transpose()?;
            Expr::Filter(Spanned::new(
                ast::Filter { name: node.name, expr, args: arguments(&node.args)? },
                span,
            ))
        }
        Expr::Test(node) => Expr::Test(Spanned::new(
            ast::Test { name: node.name, expr: expression(&node.expr)?, args: arguments(&node.args)? },
            span,
        )),
        Expr::GetAttr(node) => {
            filter(span, ATTRIBUTE, expression(&node.expr)?, [constant(span, node.name.into())])
        }
        Expr::GetItem(node) => {
            filter(span, ITEM, expression(&node.expr)?, [expression(&node.subscript_expr)?])
        }
        Expr::Call(node) => Expr::Call(call(node)?),
        Expr::List(node) => literal(span, LIST, &node.items)?,
        Expr::Tuple(node) => literal(span, TUPLE, &node.items)?,
        Expr::Map(node) => {
            let pairs = node.keys.iter().zip(&node.values).flat_map(|(key, value)| [key, value]);
            literal(span, DICT, pairs)?
        }
    })
}

fn literal<'a: 'b, 'b>(
    span: Span,
    name: &'static str,
    items: impl IntoIterator<Item = &'b Expr<'a>>,
) -> Result<Expr<'a>> {
    let items = items.into_iter().map(expression).collect::<Result<Vec<_>>>()?;
    Ok(filter(span, name, nothing(span), items))
}

fn call<'a>(node: &Spanned<ast::Call<'a>>) -> Result<Spanned<ast::Call<'a>>> {
    let mut args = arguments(&node.args)?;
    let expr = match &node.expr {
        Expr::Var(var) => {
            // The items of a recursive loop.
            if let ("loop", [CallArg::Pos(_)]) = (var.id, args.as_slice())
                && let Some(CallArg::Pos(items)) = args.pop()
            {
                args.push(CallArg::Pos(filter(items.span(), LOOP, items, [])));
            }
            copy(&node.expr)
        }
        Expr::GetAttr(method) => {
            let receiver = match &method.expr {
                Expr::Var(_) => copy(&method.expr),
                other => expression(other)?,
            };
            let method_copy = ast::GetAttr { expr: receiver, name: method.name };
            Expr::GetAttr(Spanned::new(method_copy, method.span()))
        }
        other => expression(other)?,
    };
    Ok(Spanned::new(ast::Call { expr, args }, node.span()))
}

fn arguments<'a>(args: &[CallArg<'a>]) -> Result<Vec<CallArg<'a>>> {
    let argument = |arg: &CallArg<'a>| {
        Ok(match arg {
            CallArg::Pos(expr) => CallArg::Pos(expression(expr)?),
            CallArg::Kwarg(name, expr) => CallArg::Kwarg(name, expression(expr)?),
            CallArg::PosSplat(expr) => CallArg::PosSplat(filter(expr.span(), SPLAT, expression(expr)?, [])),
            CallArg::KwargSplat(expr) => {
                CallArg::KwargSplat(filter(expr.span(), SPLAT_NAMED, expression(expr)?, []))
            }
        })
    };
    args.iter().map(argument).collect()
}
